"""What a run tells of itself: gathered on all ranks, written by the first.

Calls in the loop, in their order:

    with recorder.timer.part("forward"): ...
    sums = recorder.begin(batch)
    sums.add(micro_batch, losses); sums.reduce()
    recorder.end(sums, total, {"learning_rate": ...})
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from rich.console import Console
from torch import nn

from megablip.config import Config, dump_config
from megablip.data.loader import Loader, StepBatch
from megablip.engine.objective import Objective
from megablip.engine.progress import Progress
from megablip.engine.symmetry import StepReport
from megablip.engine.topology import Topology
from megablip.engine.zero import ZeroEngine
from megablip.metrics.board import Board, ProgressLine
from megablip.metrics.example import colour_example
from megablip.metrics.flops import ModelFlops, peak_flops
from megablip.metrics.held_out import HeldOut
from megablip.metrics.layout import PREFERENCE_CHARTS
from megablip.metrics.picture import draw_example
from megablip.metrics.profiler import StepProfiler
from megablip.metrics.startup import StartClock
from megablip.metrics.sums import RankFacts, StepSums
from megablip.metrics.timing import StepTimer
from megablip.model.blip3 import Blip3Config
from megablip.tokens import Tokenizer


class Recorder:
    """Turns steps into points of curves, one every `log.every_steps`.

    Times and rates of a point are means over the steps since the point before,
    the time for held-out data left out of the rates; all else is that of its step.

    Args:
        tower: the frozen one outside the model; None: it is trained inside.
        progress: where training stands; the loop moves it on before `end`.
        clock: its last laps are the first data and the first step.
    """

    def __init__(
        self,
        config: Config,
        model_config: Blip3Config,
        topology: Topology,
        engine: ZeroEngine,
        tower: nn.Module | None,
        loader: Loader,
        progress: Progress,
        clock: StartClock,
        objective: Objective,
    ):
        self._config, self._topology, self._loader, self._progress = config, topology, loader, progress
        self._objective = objective
        self._clock: StartClock | None = clock
        self._layout = model_config.layout
        self._flops = ModelFlops.of(engine.module, tower or engine.module.vision_tower, model_config)
        self._peak = peak_flops(torch.cuda.get_device_name()) if topology.device.type == "cuda" else None
        self._names = [source.name for source in config.data.sources]
        self._process = psutil.Process()
        self._held_out = HeldOut(config, model_config, topology, engine, tower)
        run_dir, first = Path(config.run_dir), topology.is_first
        unused = () if self._peak else ("MFU",)
        unused += () if objective.sums else PREFERENCE_CHARTS
        unused += () if config.held_out.sources else ("held-out loss by source",)
        self._board = Board(run_dir, progress.step, dump_config(config), unused) if first else None
        profiled = config.log.profile_steps if first else []
        self._profiler = StepProfiler(profiled, run_dir / "profile", topology.device, progress.step + 1)
        self._line = ProgressLine()
        self._tokenizer: Tokenizer | None = None
        self._rates: dict[str, float] = {}
        self._steps = self._tokens = 0
        self._step_flops = self._total_s = self._data_wait_s = 0.0
        self.timer = StepTimer(topology.device)
        if tower is None:
            self.timer.watch(engine.module.vision_tower, "vision", inside="forward")

    @property
    def data_wait_share(self) -> float:
        """Share of the loop's time so far that it waited for data, the first step included."""
        return self._data_wait_s / max(self._total_s, 1e-9)

    def begin(self, batch: StepBatch) -> StepSums:
        """The sums of a step, to be added to."""
        if self._clock:
            self._clock.lap("first data")
        pictures = self._config.log.picture_every_steps
        if self._board and pictures:
            self._tokenizer = self._tokenizer or Tokenizer(self._config.model.path)
            if self._clock:
                example = colour_example(batch.micro_batches[0], self._names, self._tokenizer)
                Console(soft_wrap=True).print(example or "")
            if self._progress.step % pictures == 0:
                self._show_example(batch)
        device = self._topology.device
        facts = RankFacts(dropped=batch.samples_dropped, host_bytes=self._process.memory_info().rss)
        if device.type == "cuda":
            facts.device_bytes = torch.cuda.max_memory_allocated(device)
        return StepSums(
            self._names, batch.samples_drawn, self._loader.quarantine.counts, batch.micro_batches, facts,
            self._layout, self._flops.window, self._objective.sums, self._topology.rank, self._topology.world, device,
        )  # fmt: skip

    def end(self, sums: StepSums, total: StepReport, scalars: Mapping[str, float]) -> None:
        """A step is over: `sums` are reduced, the progress counts it.

        Args:
            total: what the ranks reported of the step.
            scalars: more to write.
        """
        self._steps += 1
        self._tokens += total.tokens
        self._step_flops += self._flops.of_step(
            tokens=total.tokens,
            labels=total.valid_labels,
            pairs=sums.total.attended_pairs,
            tiles=sums.total.tiles,
            images=sum(sums.count("images").values()),
        )
        step, share = self._progress.step, self._progress.share_of(self._config.duration)
        more = dict(scalars)
        if self._held_out.is_due(step, finished=share >= 1):
            with self.timer.part("held_out"):
                more |= self._held_out.measure()
        if self._clock:
            self._clock.lap("first step")
            more |= {f"start/{name.replace(' ', '_')}_s": seconds for name, seconds in self._clock.laps.items()}
            if self._board:
                print(self._clock, flush=True)
            self._clock = None
        point = step % self._config.log.every_steps == 0 or len(more) > len(scalars)
        if point:
            self._rates = self._take_rates()
        self._profiler.next(step + 1)
        if not self._board:
            return
        if point:
            scalars = self._of_step(sums, total) | more | self._rates
            self._board.write(step, scalars, data_digest=f"{total.data_digest:016x}")
        facts = {"loss": f"{sums.loss:.4f}"}
        if self._rates:
            facts["tokens/s"] = f"{self._rates['tokens_per_s']:,.0f}"
        self._line.show(step, share, facts)

    def note(self, step: int, name: str, text: str) -> None:
        """Words about a step, for TensorBoard; on the first rank."""
        if self._board:
            self._board.note(step, name, text)

    def close(self) -> None:
        if self._board:
            self._board.close()

    def _show_example(self, batch: StepBatch) -> None:
        title = f"step {self._progress.step + 1}, first micro-batch of the first rank"
        picture = draw_example(batch.micro_batches[0], self._names, self._tokenizer, self._layout, title)
        self._board.show("packed example", picture, self._progress.step + 1)

    def _of_step(self, sums: StepSums, total: StepReport) -> dict[str, float]:
        progress, batch, samples = self._progress, self._config.batch, self._loader.samples
        sequences = batch.lanes * batch.sequences_per_lane
        scalars = {
            "loss": sums.loss,
            **({"token_loss": sums.token_loss} if sums.by_pair else {}),
            **{f"preference/{name}": value for name, value in sums.by_pair.items() if name != "loss"},
            **{f"loss_by_source/{name}": loss for name, loss in sums.loss_by_source.items()},
            "tokens_seen": progress.tokens,
            "documents_seen": progress.documents,
            "images_seen": sum(progress.images_by_source.values()),
            **{f"tokens_by_source/{name}": count for name, count in progress.tokens_by_source.items()},
            **{f"images_by_source/{name}": count for name, count in progress.images_by_source.items()},
            **{
                f"epochs_by_source/{name}": drawn / samples[name]
                for name, drawn in sums.count("drawn").items()
                if name in samples
            },
            "data/padding_share": 1 - total.tokens / (sequences * self._config.data.sequence_length),
            "data/dummy_share": sums.total.dummies / sums.total.micro_batches,
            "data/documents_per_sequence": total.documents / sequences,
            "data/visual_token_share": sums.total.visual_tokens / max(total.tokens, 1),
            "data/tiles_per_rank_mean": sums.total.tiles / self._topology.world,
            "data/tiles_per_rank_max": sums.largest.tiles,
            "skipped_steps": total.skipped_steps,  # of this attempt, before this step
            "data/samples_skipped": sum(sums.count("bad").values()),
            "data/samples_dropped": sums.total.dropped,  # too long, or too many tiles, for a sequence
            "memory/host_rss_gib": sums.largest.host_bytes / 2**30,  # the largest of the ranks, as below
        }
        if self._topology.device.type == "cuda":
            scalars["memory/device_peak_gib"] = sums.largest.device_bytes / 2**30
        return scalars

    def _take_rates(self) -> dict[str, float]:
        """Means over the steps since the last call, which start again."""
        seconds, parts = self.timer.take()
        self._total_s += seconds
        self._data_wait_s += parts.get("data_wait", 0.0)
        training_s = seconds - parts.get("held_out", 0.0)
        per_rank = self._step_flops / training_s / self._topology.world
        rates = {
            "tokens_per_s": self._tokens / training_s,
            "tflops_per_s_per_rank": per_rank / 1e12,
            "data_wait_share": self.data_wait_share,
            "time/step_s": seconds / self._steps,
            **{f"time/{name}_s": value / self._steps for name, value in parts.items()},
            "time/other_s": (seconds - sum(parts.values())) / self._steps,
        }
        if self._peak:
            rates["mfu"] = per_rank / self._peak  # of the bf16 peak, also where a run computes in fp32
        self._steps = self._tokens = 0
        self._step_flops = 0.0
        return rates
