"""What a check of the doctor is given, and what it finds."""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, slots=True)
class Place:
    """Where a check runs.

    Attributes:
        small: sizes for a few seconds on a CPU, instead of those that tell something of a GPU.
        folder: an empty one, to write to.
    """

    device: torch.device
    small: bool
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True, slots=True)
class Result:
    """One comparison.

    Attributes:
        compared: what with what, and how.
        value: None where there is none.
        tolerance: the largest right value; None: told, not judged.
        seconds: since the result before; filled in by whoever runs the check.
    """

    name: str
    compared: str
    value: float | None = None
    unit: str = ""
    tolerance: float | None = None
    remedy: str = ""
    failed: bool = False
    seconds: float = 0.0

    @classmethod
    def crash(cls, name: str, error: BaseException | str) -> Result:
        """What could not be compared; an error's first line says why."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        return cls(name, text.strip().partition("\n")[0], remedy="report this with doctor.json", failed=True)

    @property
    def ok(self) -> bool:
        """NaN is not."""
        return not self.failed and (self.tolerance is None or (self.value is not None and self.value <= self.tolerance))

    def to_json(self) -> dict[str, Any]:
        """Without NaN and infinity, which JSON does not have: they become None."""
        fields = asdict(self) | {"ok": self.ok}
        fields.pop("failed")
        if self.value is not None and not math.isfinite(self.value):
            fields |= {"value": None, "compared": f"{self.compared} (the value is {self.value})"}
        return fields


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def median_seconds(place: Place, act: Callable[[], Any], repeats: int, warm_up: int = 2) -> float:
    """Median time of a call, its work on the device included."""
    seconds = []
    for _ in range(warm_up + repeats):
        synchronize(place)
        began = time.perf_counter()
        act()
        synchronize(place)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[warm_up:])


def synchronize(place: Place) -> None:
    if place.on_gpu:
        torch.cuda.synchronize(place.device)


@dataclass
class Peak:
    """Bytes of tensors at most, beyond those that were there before."""

    bytes: int = 0


@contextmanager
def peak_memory(place: Place) -> Iterator[Peak]:
    """Measure what runs inside: by CUDA's allocator, or on a CPU by the sizes of the results of torch's calls."""
    peak = Peak()
    if not place.on_gpu:
        with _LiveTensors() as live:
            yield peak
        peak.bytes = live.peak
        return
    synchronize(place)
    before = torch.cuda.memory_allocated(place.device)
    torch.cuda.reset_peak_memory_stats(place.device)
    yield peak
    peak.bytes = torch.cuda.max_memory_allocated(place.device) - before


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of what torch's calls return, until they are freed; not what a call needs inside."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self._bytes = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        known = {_storage(tensor)._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = _storage(tensor)
                key = storage._cdata
                if key not in known and key not in self._live:
                    self._live[key] = storage.nbytes()
                    self._bytes += storage.nbytes()
                    self.peak = max(self.peak, self._bytes)
                    weakref.finalize(storage, self._free, key)
        return results

    def _free(self, key: int) -> None:
        self._bytes -= self._live.pop(key)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
