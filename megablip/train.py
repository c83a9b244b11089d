"""The training loop. One process of this is one data-parallel rank.

    megablip train RECIPE                                        checks, then starts the ranks
    torchrun --nproc-per-node 2 -m megablip.train RUN/config.yaml    the ranks by hand

Read top to bottom: `main` turns errors into messages, `run` builds the parts
and finds where to begin, `Trainer.train` loops, `Trainer.step` is one step.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megablip.checkpoint.commit import CheckpointStore
from megablip.checkpoint.export import ExportReader, file_hash, load_tower
from megablip.checkpoint.slices import SliceReader, write_slices
from megablip.config import Config, dump_config, load_config
from megablip.data.loader import Loader, StepBatch, micro_batches_per_step
from megablip.engine.health import StopSignal
from megablip.engine.progress import Progress
from megablip.engine.rng import restore_rng, rng_states
from megablip.engine.schedule import learning_rates
from megablip.engine.status import Outcome, RunStatus
from megablip.engine.symmetry import StepReport, StepReports, calls_signature, exchange
from megablip.engine.topology import Topology, init_distributed
from megablip.engine.zero import ZeroEngine, complete_ds_config
from megablip.errors import CheckpointError, MegablipError, RankMismatchError
from megablip.metrics.board import Board, ProgressLine
from megablip.metrics.sources import SourceSums
from megablip.model.attention import select_backend
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.model.vision import encode_tiles


def main() -> None:
    stop, rank, status = StopSignal().install(), "?", None
    try:
        config = load_config(sys.argv[1])
        topology = init_distributed(config.engine.timeout_s, config.engine.threads)
        rank = topology.rank
        if topology.is_first:
            status = RunStatus(Path(config.run_dir))
            status.begin(topology.world)
        run(config, topology, status, stop)
    except Exception as error:
        known = isinstance(error, MegablipError)
        text = f"{type(error).__name__}: {error}" if known else traceback.format_exc()
        print(f"[rank {rank}] {text}", file=sys.stderr, flush=True)
        if status:
            status.update(outcome="failed", reason=f"{type(error).__name__}: {error}")
        sys.exit(1)


def run(config: Config, topology: Topology, status: RunStatus | None, stop: StopSignal) -> None:
    """Build the parts, begin or resume, train, save."""
    run_dir, say = Path(config.run_dir), _speaker(topology)
    torch.manual_seed(config.seed + topology.rank)
    model_config = Blip3Config.from_pretrained(config.model.path)
    export = ExportReader(config.model.path)
    base = {"model": export.hash(), "tokenizer": file_hash(Path(config.model.path) / "tokenizer.json")}

    store = CheckpointStore(run_dir / "checkpoints", config.checkpoint.keep, topology)
    checkpoint = store.newest(say) if config.resume == "auto" else None
    progress, lane_states = Progress(), None
    if checkpoint:
        checkpoint.check_base(base, config.model.path)
        progress, lane_states = Progress(**checkpoint.trainer_state["progress"]), checkpoint.lane_states()

    # The loader's processes read ahead while the engine is built.
    with Loader(
        config, config.model.path, model_config.layout, topology.rank, topology.world, lane_states, progress.step,
        pin_memory=topology.device.type == "cuda",
    ) as loader:  # fmt: skip
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        backend = select_backend(topology.device.type, dtype)
        say(f"attention: {backend.name} ({backend.reason})")
        micro_batches = micro_batches_per_step(config, topology.world)
        ds_config = complete_ds_config(config.engine, config.optimizer.clip_norm, micro_batches, topology.device.type)
        say(f"DeepSpeed: {ds_config}")
        engine = ZeroEngine(partial(_build, model_config, config), ds_config, config.optimizer, topology)
        if checkpoint:
            reader = SliceReader(checkpoint.folder)
            engine.load(reader.read, moments=True, adam_step=checkpoint.trainer_state["adam_step"])
            restore_rng(reader.rng_states(topology.rank))
            say(f"resumed from {checkpoint.folder.name}")
        else:
            engine.load(export.read, moments=False)
            say(f"starting from {config.model.path}")
        tower = None  # trained: inside the engine
        if not config.model.train_tower:
            tower = load_tower(export, model_config.vision_config, dtype, topology.device)

        board = Board(run_dir, progress.step, dump_config(config)) if topology.is_first else None
        trainer = Trainer(config, topology, engine, tower, loader, store, base, progress, board, stop, say)
        outcome = trainer.train()
    if board and status:
        board.close()
        status.update(outcome=outcome, last_step=progress.step)
    say(f"{outcome} at step {progress.step}: {progress.tokens} tokens, {progress.documents} documents")
    say(f"waited for data {trainer.data_wait_share:.1%} of the loop's time")
    topology.leave()


def _build(model_config: Blip3Config, config: Config) -> Blip3ForConditionalGeneration:
    """The part of the model that is trained; a frozen tower stays outside the engine."""
    trained = config.model.train_tower
    model = Blip3ForConditionalGeneration(model_config, with_vision_tower=trained, train_tower=trained)
    if config.model.activation_checkpointing:
        # Non-reentrant, for inputs without a gradient are right in it too.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model


@dataclass
class Trainer:
    """The loop and what it needs."""

    config: Config
    topology: Topology
    engine: ZeroEngine
    tower: torch.nn.Module | None  # None where it is trained, inside the engine
    loader: Loader
    store: CheckpointStore
    base: dict[str, str]  # hashes of what the run began with
    progress: Progress
    board: Board | None
    stop: StopSignal
    say: Callable[[str], None]
    began: float = 0.0
    data_wait_s: float = 0.0

    def train(self) -> Outcome:
        """Step until the duration is done or any rank is asked to stop; save; the outcome."""
        line, self.began = ProgressLine(), time.perf_counter()
        lane_states = None  # of the last step trained, not of the last one fetched
        stop_at = self.config.stop_after_steps or math.inf
        while not self.finished and self.progress.step < stop_at:
            step_began = time.perf_counter()
            batch, reports = self.fetch()
            total = reports.total
            if total.stop:
                self.say(f"asked to stop at step {self.progress.step}; saving")
                break
            scalars = self.step(batch, total)
            lane_states = batch.lane_states
            scalars["tokens_per_s"] = total.tokens / (time.perf_counter() - step_began)
            if self.board:
                if self.progress.step % self.config.log.every_steps == 0:
                    self.board.write(self.progress.step, scalars, data_digest=f"{total.data_digest:016x}")
                line.show(self.progress.step, self.share_done, _facts(scalars))
            if self.progress.step % self.config.checkpoint.every_steps == 0 and not self.finished:
                try:
                    self.save(lane_states)
                except CheckpointError as error:
                    self.say(f"checkpoint not saved, training goes on: {error}")
        if lane_states is not None:
            self.save(lane_states)
        return "finished" if self.finished else "stopped"

    def fetch(self) -> tuple[StepBatch, StepReports]:
        """This rank's share of the next global batch, and what all ranks know of it.

        A rank that fails to get its share still takes part in the exchange, so
        that the others end with a reason instead of waiting for it.
        """
        began, batch, failure = time.perf_counter(), None, None
        try:
            batch = next(self.loader)
        except MegablipError as error:
            failure = error
        self.data_wait_s += time.perf_counter() - began
        reports = exchange(
            StepReport(
                step=self.progress.step,
                micro_batches=self.engine.micro_batches,
                calls=calls_signature(batch.micro_batches) if batch else 0,
                tokens=batch.tokens if batch else 0,
                documents=batch.documents if batch else 0,
                valid_labels=batch.valid_labels if batch else 0,
                samples_done=batch.samples_done if batch else 0,
                data_digest=batch.data_digest if batch else 0,
                tiles=sum(len(micro_batch.tiles) for micro_batch in batch.micro_batches) if batch else 0,
                stop=int(bool(self.stop.received)),
                failed=int(failure is not None),
            ),
            self.topology,
        )
        if failure:
            raise failure
        if reports.total.failed:
            ranks = [rank for rank, failed in enumerate(reports.of("failed")) if failed]
            raise RankMismatchError("another rank could not get its data; its message says why", where=f"ranks {ranks}")
        return batch, reports

    def step(self, batch: StepBatch, total: StepReport) -> dict[str, float]:
        """One optimizer step on the global batch; the scalars to log.

        The gradient is that of the sum of token losses over the count of valid
        labels of the *global* batch, however it is split into ranks and
        micro-batches: ZeRO averages over ranks, hence the factor `world`.
        """
        config, progress, device = self.config, self.progress, self.topology.device
        rates = learning_rates(
            config.optimizer, config.duration,
            step=progress.step, tokens=progress.tokens, epochs=progress.epochs, step_tokens=total.tokens,
        )  # fmt: skip
        scale = self.topology.world / max(total.valid_labels, 1)
        names, loader = [source.name for source in config.data.sources], self.loader
        sums = SourceSums(names, batch.samples_drawn, loader.quarantine.counts, device)
        for micro_batch in batch.micro_batches:
            micro_batch = micro_batch.to(device)
            features = encode_tiles(self.tower, micro_batch.tiles) if self.tower else None
            losses = self.engine(packed=micro_batch, vision_features=features)
            self.engine.backward(losses.loss * scale)
            self.engine.step(rates)
            sums.add(micro_batch, losses)
        sums.reduce()
        loader.quarantine.check(sums.bad, loader.samples)

        progress.step += 1
        progress.tokens += total.tokens
        progress.documents += total.documents
        progress.samples, progress.samples_per_epoch = total.samples_done, sum(loader.samples.values())
        return sums.scalars(loader.samples) | {
            "grad_norm": self.engine.grad_norm,
            "learning_rate": rates["decoder"],
            **{f"learning_rate_by_part/{part}": rates[part] for part in config.optimizer.lr_by_part},
            "tokens_seen": progress.tokens,
            "documents_seen": progress.documents,
            "data_wait_s": batch.data_wait_s,
            "data_wait_share": self.data_wait_share,
            "padding_share": 1 - total.tokens / self.slots_per_step,
            "step_skipped": float(not self.engine.was_step_applied),
        }

    def save(self, lane_states: dict[int, np.ndarray]) -> None:
        """Commit a checkpoint of this moment (a collective).

        Raises:
            CheckpointError: it could not be written; earlier ones are untouched.
        """
        folder = self.store.save(
            self.progress.step,
            lambda path: write_slices(path, self.engine.local_slices(), rng_states()),
            lane_states,
            {
                "progress": asdict(self.progress),
                "adam_step": self.engine.adam_step(),
                "base": self.base,
                "world": self.topology.world,
                "sources": [source.name for source in self.config.data.sources],
            },
        )
        self.say(f"saved {folder}")

    @property
    def slots_per_step(self) -> int:
        batch = self.config.batch
        return batch.lanes * batch.sequences_per_lane * self.config.data.sequence_length

    @property
    def data_wait_share(self) -> float:
        """Share of the loop's time so far that it waited for data, the first step included."""
        return self.data_wait_s / max(time.perf_counter() - self.began, 1e-9)

    @property
    def share_done(self) -> float:
        return self.progress.share_of(self.config.duration)

    @property
    def finished(self) -> bool:
        return self.share_done >= 1.0


def _facts(scalars: dict[str, float]) -> dict[str, str]:
    return {
        "loss": f"{scalars['loss']:.4f}",
        "tokens/s": f"{scalars['tokens_per_s']:,.0f}",
        "lr": f"{scalars['learning_rate']:.1e}",
        "data wait": f"{scalars['data_wait_share']:.1%}",
    }


def _speaker(topology: Topology) -> Callable[[str], None]:
    """Prints on the first rank only."""
    return lambda text: print(text, flush=True) if topology.is_first else None


if __name__ == "__main__":
    main()
