"""The training loop. One process of this is one data-parallel rank.

    megablip train RECIPE                                        checks, then starts the ranks
    torchrun --nproc-per-node 2 -m megablip.train RUN/config.yaml    the ranks by hand

Read top to bottom: `main` turns errors into messages, `run` builds the parts
and finds where to begin, `Trainer.train` loops, `Trainer.step` is one step.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megablip.checkpoint.commit import CheckpointStore
from megablip.checkpoint.export import ExportReader, base_of, check_sampler, first_weights, load_tower
from megablip.checkpoint.saver import Saver
from megablip.checkpoint.slices import SliceReader
from megablip.checkpoint.start import check_start
from megablip.config import Config, load_config
from megablip.data.loader import Loader, StepBatch, micro_batches_per_step
from megablip.engine.determinism import make_deterministic
from megablip.engine.ds_config import complete_ds_config
from megablip.engine.guard import Guard, end_run
from megablip.engine.health import HealthMonitor
from megablip.engine.objective import Objective, objective_of
from megablip.engine.progress import Progress
from megablip.engine.rng import restore_rng
from megablip.engine.schedule import learning_rates
from megablip.engine.signals import StopSignal
from megablip.engine.status import Outcome, RunStatus
from megablip.engine.symmetry import StepReport, StepReports, exchange, raise_failure, report_of
from megablip.engine.topology import Topology, init_distributed
from megablip.engine.zero import ZeroEngine
from megablip.errors import MegablipError
from megablip.metrics.recorder import Recorder
from megablip.metrics.startup import StartClock
from megablip.model.attention import head_sizes, select_backend, use_backend
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.model.compiling import compile_blocks
from megablip.model.decoder import check_attention
from megablip.model.layout import check_tokenizer
from megablip.model.trained import trained_part
from megablip.model.vision import encode_tiles


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m megablip.train RUN/config.yaml; `megablip train RECIPE` starts the ranks of it")
    stop, guard, clock = StopSignal().install(), None, StartClock()
    try:
        config = load_config(sys.argv[1])
        if config.deterministic:
            make_deterministic()
        topology = init_distributed(config.engine.timeout_s, config.engine.threads)
        RunStatus.join(Path(config.run_dir), topology)
        clock.lap("JIT and rendezvous")
        guard = Guard(config, topology)
        run(config, topology, guard, stop, clock)
    except Exception as error:
        end_run(error, guard, Path(sys.argv[1]).parent)  # that of RUN/config.yaml


def run(config: Config, topology: Topology, guard: Guard, stop: StopSignal, clock: StartClock) -> None:
    """Build the parts, begin or resume, train, save."""
    run_dir, say = Path(config.run_dir), topology.say
    status = RunStatus.of_rank(run_dir)
    torch.manual_seed(config.seed + topology.rank)
    check_start(config.model.path)
    model_config = Blip3Config.of_run(config.model)
    check_attention(model_config.text_config)
    check_tokenizer(config.model)
    export = ExportReader(config.model.path)
    check_sampler(export, model_config)
    base = base_of(export, model_config, topology)
    objective = objective_of(config, base, model_config.layout)
    store = CheckpointStore(run_dir / "checkpoints", config.checkpoint.keep, topology, status)
    checkpoint = store.newest(say) if config.resume == "auto" else None
    progress, lane_states = Progress(), None
    if checkpoint:
        checkpoint.check(config, base)
        progress, lane_states = Progress(**checkpoint.trainer_state["progress"]), checkpoint.lane_states()

    # The loader's processes read ahead while the engine is built.
    with Loader(
        config, config.model.path, model_config.layout, topology.rank, topology.world, lane_states, progress.step,
        pin_memory=topology.device.type == "cuda",
    ) as loader:  # fmt: skip
        clock.lap("checkpoint and loader")
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        heads = head_sizes(model_config.text_config, model_config.sampler)
        attention = select_backend(topology.device.type, dtype, heads, config.model.attention)
        use_backend(attention.name)
        say(f"attention: {attention}")
        micro_batches = micro_batches_per_step(config, topology.world)
        ds_config = complete_ds_config(config.engine, config.optimizer.clip_norm, micro_batches, topology)
        say(f"DeepSpeed: {ds_config}")
        engine = ZeroEngine(partial(build_trained, model_config, config), ds_config, config.optimizer, topology)
        begin = first_weights(export, config.seed)
        if checkpoint:
            reader = SliceReader(checkpoint.folder)
            adam_step = checkpoint.trainer_state["adam_step"]
            engine.load(reader.read, moments=True, adam_step=adam_step, read_frozen=begin)
            restore_rng(reader.rng_states(topology.rank))
            say(f"resumed from {checkpoint.folder.name}")
        else:
            engine.load(begin, moments=False)
            say(f"starting from {config.model.path}")
        tower = None  # trained: inside the engine
        if not config.model.train_tower:
            tower = load_tower(export, model_config.vision_config, dtype, topology.device)

        clock.lap("engine")
        recorder = Recorder(config, model_config, topology, engine, tower, loader, progress, clock, objective)
        if not config.engine.compile_blocks:  # without ZeRO-3 there are no collectives inside
            guard.watch(engine.module)
        health = HealthMonitor(config, topology, progress.step, base, say, recorder.note)
        saver = Saver(config, store, engine, progress, topology, base, say)
        trainer = Trainer(
            config, topology, engine, tower, objective, loader, saver, progress, recorder, stop, guard, health, say
        )
        if topology.is_first:
            status.update(ranks=topology.world, first_step=progress.step)
        try:
            outcome = trainer.train()
        finally:
            recorder.close()
    if topology.is_first:
        status.end(outcome, last_step=progress.step)
    guard.close()
    say(f"{outcome} at step {progress.step}: {progress.tokens} tokens, {progress.documents} documents")
    say(f"waited for data {recorder.data_wait_share:.1%} of the loop's time")
    topology.leave()


def build_trained(model_config: Blip3Config, config: Config) -> Blip3ForConditionalGeneration:
    """The part of the model that is trained; a frozen tower stays outside the engine."""
    model = trained_part(model_config, config.model)
    if config.model.activation_checkpointing:
        # Non-reentrant, for inputs without a gradient are right in it too.
        model.activation_checkpointing_enable({"use_reentrant": False}, config.model.activation_checkpointing)
    if config.engine.compile_blocks:
        compile_blocks(model.decoder)
    return model


@dataclass
class Trainer:
    """The loop and what it needs."""

    config: Config
    topology: Topology
    engine: ZeroEngine
    tower: torch.nn.Module | None  # None where it is trained, inside the engine
    objective: Objective
    loader: Loader
    saver: Saver
    progress: Progress
    recorder: Recorder
    stop: StopSignal
    guard: Guard
    health: HealthMonitor
    say: Callable[[str], None]

    def train(self) -> Outcome:
        """Step until the duration is done or any rank is asked to stop; save; the outcome."""
        lane_states = None  # of the last step trained, not of the last one fetched
        stop_at = self.config.stop_after_steps or math.inf
        while not self.finished and self.progress.step < stop_at:
            batch, reports = self.fetch()
            total = reports.total
            if total.stop:
                self.say(f"asked to stop at step {self.progress.step}; saving")
                break
            self.step(batch, total)
            lane_states = batch.lane_states
            self.guard.enter("save")
            with self.recorder.timer.part("save"):
                self.saver.maybe_save(total, lane_states)
        self.health.close()
        self.guard.enter("save")
        self.saver.finish(lane_states)
        return "finished" if self.finished else "stopped"

    def fetch(self) -> tuple[StepBatch, StepReports]:
        """This rank's share of the next global batch, and what all ranks know of it.

        A rank that fails to get its share still takes part in the exchange, so
        that the others end with a reason instead of waiting for it.
        """
        timer = self.recorder.timer
        self.guard.begin_step(self.progress.step)
        try:
            with timer.part("data_wait"):
                batch, failure = next(self.loader), None
        except MegablipError as error:
            batch, failure = None, error
        self.guard.enter("exchange")
        report = report_of(
            batch,
            step=self.progress.step,
            micro_batches=self.engine.micro_batches,
            stop=int(bool(self.stop.received)),
            **self.health.flags(),
            **self.saver.report(),
        )
        with timer.part("exchange"):
            reports = exchange(report, self.topology)
        if reports.total.failed:
            raise_failure(failure, self.topology)
        self.health.review(reports)
        return batch, reports

    def step(self, batch: StepBatch, total: StepReport) -> None:
        """One optimizer step on the global batch.

        The gradient is that of the sum of losses over the count of valid labels
        (or preference pairs) of the *global* batch, however it is split into ranks
        and micro-batches: ZeRO averages over ranks, hence the factor `world`.
        """
        self.guard.enter("step")
        config, progress, loader, part = self.config, self.progress, self.loader, self.recorder.timer.part
        rates = learning_rates(
            config.optimizer, config.duration,
            step=progress.step, tokens=progress.tokens, epochs=progress.epochs, step_tokens=total.tokens,
        )  # fmt: skip
        scale = self.topology.world / max(self.objective.count(total), 1)
        sums = self.recorder.begin(batch)
        for micro_batch in batch.micro_batches:
            micro_batch = micro_batch.to(self.topology.device)
            with part("vision"), self.health.local():
                features = encode_tiles(self.tower, micro_batch.tiles) if self.tower else None
            with part("forward"):
                losses, found = self.objective(self.engine, micro_batch, features)
            with part("backward"):
                self.engine.backward(losses.loss * self.health.factor(losses.loss, scale))
            with part("optimizer"):
                self.engine.step(rates)
            sums.add(micro_batch, losses, found)
        sums.reduce()
        loader.quarantine.check(sums.count("bad"), sums.count("drawn"), loader.samples)

        progress.step += 1
        progress.tokens += total.tokens
        progress.documents += total.documents
        progress.samples, progress.samples_per_epoch = total.samples_done, sum(loader.samples.values())
        progress.add_by_source(sums.count("tokens"), sums.count("images"))
        scalars = {
            "grad_norm": self.engine.grad_norm,
            "learning_rate": rates["decoder"],
            **{f"learning_rate_by_part/{name}": rates[name] for name in config.optimizer.lr_by_part},
            **self.health.observe(
                progress.step,
                batch,
                sums.loss,
                applied=self.engine.was_step_applied,
                chosen_log_ratio=sums.by_pair.get("chosen_log_ratio"),
            ),
            **self.saver.scalars(),
        }
        self.guard.enter("record")
        self.recorder.end(sums, total, scalars)

    @property
    def share_done(self) -> float:
        return self.progress.share_of(self.config.duration)

    @property
    def finished(self) -> bool:
        return self.share_done >= 1.0


if __name__ == "__main__":
    main()
