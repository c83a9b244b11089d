"""What a run's steps say of its health: skipped steps, loss spikes, slow ranks, preferred answers that grow rare.

`observe` looks at a step that has just ended; what it finds travels in the
next step's exchange, and `review` acts on what all ranks then know.  So no
collective is added to a healthy step.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from megablip.config import Config, HealthConfig, dump_config
from megablip.data.loader import StepBatch
from megablip.engine.symmetry import StepReport, StepReports, setup_signature
from megablip.engine.topology import Topology, node_name
from megablip.errors import DivergenceError

# The median absolute deviation of a normal distribution is its standard deviation over this.
_MAD_SCALE = 1.4826
# A loss may rise by this share without being a spike, however quiet the steps before it were.
_QUIET_SHARE = 0.02
# Nats a label that preferred answers may lose on the reference, in the mean over so many steps.  Training as it
# should be moves them by tenths; a model that was destroyed, at a loss that looked well, had lost some four.
_CHOSEN_FALL_NATS, _CHOSEN_STEPS = 1.0, 8
# Slow in a way that matters: shares of an interval below this are noise.
_NOTABLE_SHARE = 0.02


class HealthMonitor:
    """One rank's part in watching the run.

    Args:
        config: the run; `health` has the limits. RUN/health.jsonl is written by the first rank,
            and lines after `start_step` are taken back.
        start_step: steps done when this attempt begins.
        base: hashes of what the run began with.
        say: prints a line on the first rank.
        note: called with (step, name, text) for TensorBoard.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        start_step: int,
        base: dict[str, str],
        say: Callable[[str], Any],
        note: Callable[[int, str, str], Any],
    ):
        self._config, self._topology, self._say, self._note = config.health, topology, say, note
        self._source_names = [source.name for source in config.data.sources]
        self._spikes = SpikeDetector(config.health.spike_window_steps, config.health.spike_deviations)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=topology.device)
        self._last: dict[str, Any] | None = None  # the step observed last, until it is reviewed
        self._setup = setup_signature(dump_config(config), base)
        self._flags = {"setup": self._setup}
        self._skipped = self._skipped_in_a_row = 0
        self._local = LocalTimer(topology.device)
        self._chosen = ChosenWatch()
        self._stragglers = StragglerReport(topology, config.health)
        self._log = _EventLog(Path(config.run_dir) / "health.jsonl", start_step) if topology.is_first else None

    def factor(self, loss: torch.Tensor, scale: float) -> torch.Tensor:
        """What to multiply a micro-batch's loss with: `scale`, or NaN if the loss is not finite.

        A loss may be infinite and its gradient finite; NaN reaches the
        gradient of every rank, and ZeRO skips the step on all.
        """
        finite = torch.isfinite(loss.detach())
        self._nonfinite += ~finite
        return torch.where(finite, scale, math.nan)

    @contextmanager
    def local(self) -> Iterator[None]:
        """Around a part of a step that has no collective: what a slow rank is slow in."""
        self._local.start()
        yield
        self._local.stop()

    def observe(
        self, step: int, batch: StepBatch, loss: float, *, applied: bool, chosen_log_ratio: float | None = None
    ) -> dict[str, float]:
        """Look at the step that brought the run to `step`.

        Args:
            loss: of the global batch.
            applied: whether the optimizer updated the weights.
            chosen_log_ratio: of preference tuning, of the global batch, nats a label.

        Returns:
            Scalars to log.
        """
        spike = self._spikes.add(loss) if applied else None
        if chosen_log_ratio is not None and (mean := self._chosen.add(chosen_log_ratio)) is not None:
            if self._log:
                self._log.write({"step": step, "event": "preferred answers grow rare", "nats_per_label": mean})
            self._alert(
                step,
                f"preferred answers grow rare: at step {step} they are {-mean:.2f} nats a label less likely than by "
                "the reference, which loss and accuracy don't show; lower optimizer.lr, or raise preference.sft_weight",
            )
        if not applied:
            self._skipped += 1
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        nonfinite = int(self._nonfinite)
        self._nonfinite.zero_()
        self._flags = {
            "setup": self._setup,
            "skipped_steps": self._skipped,
            "nonfinite": nonfinite,
            "wants_keys": int(not applied or spike is not None),
            "local_us": round(1e6 * self._local.take_s()),
            "data_wait_us": round(1e6 * batch.data_wait_s),
        }
        keys = [(micro_batch.source, micro_batch.keys) for micro_batch in batch.micro_batches]  # not the tiles
        self._last = {"step": step, "keys": keys, "loss": loss, "spike": spike}
        return {"step_skipped": float(not applied), **self._stragglers.take_scalars()}

    def flags(self) -> dict[str, int]:
        """Fields of this rank's next StepReport: about the step before."""
        return self._flags

    def _alert(self, step: int, text: str) -> None:
        self._say(text)
        self._note(step, "health", text)

    def review(self, reports: StepReports) -> None:
        """Act on what all ranks said of the step before (a collective if there is something to write down).

        Raises:
            DivergenceError: too many steps were skipped in a row.
        """
        if self._last is None:
            return
        last, self._last = self._last, None
        if reports.total.wants_keys:
            self._write_down(last, reports.of("nonfinite"))
        for text in self._stragglers.add(reports):
            self._alert(last["step"], text)
        if self._skipped_in_a_row >= self._config.max_skipped_in_a_row:
            raise DivergenceError(
                f"{self._skipped_in_a_row} steps in a row had a loss or a gradient that is not finite and were skipped",
                where=f"up to step {last['step']}",
                remedy="the steps' samples are in health.jsonl: look at them, lower the learning rate or the clipping "
                "norm, and go on from a checkpoint before; health.max_skipped_in_a_row is the limit",
            )

    def close(self) -> None:
        """Review the last step, which no exchange comes after (a collective)."""
        if self._last is not None:
            mine = StepReport(step=0, micro_batches=0, **self._flags)
            self.review(StepReports(self._topology.gather(mine)))

    def _write_down(self, last: dict[str, Any], nonfinite: list[int]) -> None:
        keys = self._topology.gather(self._named(last["keys"]))
        if self._log is None:
            return
        bad_ranks = [rank for rank, count in enumerate(nonfinite) if count]
        event: dict[str, Any] = {"step": last["step"], "loss": last["loss"] if math.isfinite(last["loss"]) else None}
        if last["spike"]:
            event |= {"event": "loss spike", **last["spike"]}
            text = (
                f"loss spike at step {last['step']}: {last['loss']:.4f}, the median was {last['spike']['median']:.4f}"
            )
        else:
            cause = f"loss not finite on rank {', '.join(map(str, bad_ranks))}" if bad_ranks else "gradient not finite"
            event |= {"event": "skipped step", "cause": cause, "nonfinite_ranks": bad_ranks}
            text = f"step {last['step']} skipped on all ranks: {cause}"
        event["keys"] = {str(rank): of_rank for rank, of_rank in enumerate(keys)}
        self._log.write(event)
        some = [key for rank in bad_ranks or range(len(keys)) for key in keys[rank]]
        listed = ", ".join(some[:4]) + (f" and {len(some) - 4} more" if len(some) > 4 else "")
        self._alert(last["step"], f"{text}; samples: {listed}; all are in {self._log.path}")

    def _named(self, keys: list[tuple[torch.Tensor, list[str]]]) -> list[str]:
        """`source/key` of each document of this rank's share."""
        return [
            f"{self._source_names[source]}/{key}"
            for sources, of_micro_batch in keys
            for source, key in zip(sources.tolist(), of_micro_batch, strict=False)  # a dummy has no keys
        ]


class SpikeDetector:
    """Tells a loss that stands out from those before it.

    Robust: each loss is compared with the median of the few before it, which a
    spike does not move, and its distance with the median absolute distance in
    a longer window, which a falling loss does not widen.  After a resume it
    starts anew, and is silent until half a window is there.

    Args:
        window: distances to compare with; the median is of an eighth as many losses.
        deviations: how far above the median a spike is, in scaled deviations.
    """

    def __init__(self, window: int, deviations: float):
        self._losses: deque[float] = deque(maxlen=max(window // 8, 4))
        self._distances: deque[float] = deque(maxlen=window)
        self._deviations = deviations

    def add(self, loss: float) -> dict[str, float] | None:
        """The median and the deviation if this is a spike."""
        found = None
        if self._losses:
            median = statistics.median(self._losses)
            if len(self._distances) >= self._distances.maxlen // 2:
                deviation = _MAD_SCALE * statistics.median(self._distances)
                if loss - median > max(self._deviations * deviation, _QUIET_SHARE * abs(median)):
                    found = {"median": median, "deviation": deviation}
            if math.isfinite(loss):
                self._distances.append(abs(loss - median))
        if math.isfinite(loss):
            self._losses.append(loss)
        return found


class ChosenWatch:
    """Tells when preferred answers have become much less likely than by the reference.

    A preference loss asks for their distance from the others only, and falls
    while both fall (arXiv 2402.13228, "likelihood displacement" in 2410.08847).
    """

    def __init__(self):
        self._ratios: deque[float] = deque(maxlen=_CHOSEN_STEPS)
        self._told = False

    def add(self, ratio: float) -> float | None:
        """The mean of the last steps where it falls below the limit: once, until it has risen again."""
        if not math.isfinite(ratio):
            return None
        self._ratios.append(ratio)
        mean = statistics.fmean(self._ratios)
        if len(self._ratios) < _CHOSEN_STEPS or mean > -_CHOSEN_FALL_NATS:
            self._told = self._told and mean < -_CHOSEN_FALL_NATS / 2
            return None
        told, self._told = self._told, True
        return None if told else mean


class LocalTimer:
    """Time spent between `start` and `stop`; on a GPU by events, which do not make the host wait."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._began: Any = None

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> None:
        self._spans.append((self._began, self._now()))

    def take_s(self) -> float:
        """Seconds since it was last asked; on a GPU this waits until the last span is done."""
        spans, self._spans = self._spans, []
        if not self._on_gpu:
            return sum(end - start for start, end in spans)
        if spans:
            spans[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1e3

    def _now(self) -> Any:
        if not self._on_gpu:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StragglerReport:
    """Names ranks that are slower than the others.

    A step takes as long as its slowest rank, and in collectives all wait alike;
    so ranks are compared by the time they spend where no collective is, and by
    their wait for data.
    """

    def __init__(self, topology: Topology, config: HealthConfig):
        self._config = config
        self._hosts = topology.gather(node_name())
        self._scalars: dict[str, float] = {}
        self._begin()

    def add(self, reports: StepReports) -> list[str]:
        """Count a step of all ranks; every so many steps, a line for each kind of slowness found."""
        for name, sums in self._sums.items():
            self._sums[name] = [total + value for total, value in zip(sums, reports.of(name), strict=True)]
        self._steps += 1
        if self._steps < self._config.straggler_every_steps:
            return []
        lines, interval_s = [], perf_counter() - self._began
        for name, what in (("local_us", "compute"), ("data_wait_us", "data wait")):
            seconds = [total / 1e6 for total in self._sums[name]]
            median = statistics.median(seconds)
            self._scalars |= {
                f"ranks/{what.replace(' ', '_')}_s_median": median / self._steps,
                f"ranks/{what.replace(' ', '_')}_s_max": max(seconds) / self._steps,
            }
            limit = max(self._config.straggler_ratio * median, median + _NOTABLE_SHARE * interval_s)
            slow = sorted(
                (rank for rank, value in enumerate(seconds) if value > limit), key=lambda rank: -seconds[rank]
            )
            if slow:
                named = ", ".join(self._describe(rank, seconds[rank]) for rank in slow[:8])
                more = f" and {len(slow) - 8} more" if len(slow) > 8 else ""
                lines.append(
                    f"slow in {what}: {named}{more}; the median of {len(seconds)} ranks is {median / self._steps:.3f} s"
                )
        self._begin()
        return lines

    def take_scalars(self) -> dict[str, float]:
        """Of the interval that has just ended, per step; nothing in between."""
        scalars, self._scalars = self._scalars, {}
        return scalars

    def _describe(self, rank: int, seconds: float) -> str:
        tiles = self._sums["tiles"][rank] / self._steps
        return f"rank {rank} on {self._hosts[rank]} {seconds / self._steps:.3f} s a step ({tiles:.1f} tiles)"

    def _begin(self) -> None:
        self._sums = {name: [0] * len(self._hosts) for name in ("local_us", "data_wait_us", "tiles")}
        self._steps, self._began = 0, perf_counter()


class _EventLog:
    """RUN/health.jsonl: a line for each event."""

    def __init__(self, path: Path, start_step: int):
        self.path = path
        try:
            if path.exists():
                lines = path.read_text(errors="replace").splitlines()
                kept = [line for line in lines if _step_of(line) <= start_step]
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(line + "\n" for line in kept))
                os.replace(temporary, path)
        except OSError as error:
            print(f"can't read {path}: {error}", file=sys.stderr, flush=True)

    def write(self, event: dict[str, Any]) -> None:
        try:
            with self.path.open("a") as stream:
                stream.write(json.dumps(event) + "\n")
        except OSError as error:  # a full disk: no reason to stop training
            print(f"can't write {self.path}: {error}; {event}", file=sys.stderr, flush=True)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut off by a crash
