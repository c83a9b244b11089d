"""A conversion in a process of its own: for each line it is given, its seconds, memory and bytes as a line of JSON.

    python -m tools.bench.convert_side WHAT SOURCE OUTPUT [sync]

What is imported before the first line is not counted; `sync` counts until the
output is on disk, without it nobody syncs. Bytes are those of read and write
calls, of child processes too, plus those of files that we read through maps.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


def rival_to_hf(source: Path, output: Path) -> Callable[[], int]:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    def run() -> int:
        convert_zero_checkpoint_to_state_dict(str(source), str(output), safe_serialization=True)
        return 0

    return run


def to_hf(dtype: str) -> Callable[[Path, Path], Callable[[], int]]:
    def prepare(source: Path, output: Path) -> Callable[[], int]:
        from megablip.convert.zero_files import zero_files_to_hf

        def run() -> int:
            zero_files_to_hf(source, output, dtype)
            return 0

        return run

    return prepare


def rival_to_universal(source: Path, output: Path) -> Callable[[], int]:
    from deepspeed.checkpoint import ds_to_universal

    arguments = ["--input_folder", str(source / "step"), "--output_folder", str(output)]
    arguments += ["--num_extract_workers", "2", "--num_merge_workers", "2"]
    sys.argv[1:] = arguments
    parsed = ds_to_universal.parse_arguments()

    def run() -> int:
        ds_to_universal.main(parsed)
        return 0

    return run


def import_zero(source: Path, output: Path) -> Callable[[], int]:
    import numpy as np

    from megablip.checkpoint.deepspeed_files import read_zero
    from megablip.convert.import_zero import import_zero

    config = recipe(output, source / "model")

    def run() -> int:
        state = read_zero(source)
        import_zero(state, config, state.shapes, {0: np.zeros(1, np.int64)}, allow_changes=True)
        return sum(path.stat().st_size for path in (source / "step").glob("*optim_states.pt"))

    return run


def own_to_hf(source: Path, output: Path) -> Callable[[], int]:
    from megablip.convert.to_hf import zero_to_hf

    def run() -> int:
        zero_to_hf(source, output)
        return 0

    return run


def plain_copy(source: Path, output: Path) -> Callable[[], int]:
    def run() -> int:
        output.mkdir()
        with (source / "model.safetensors").open("rb") as one, (output / "model.safetensors").open("wb") as other:
            while data := one.read(8 << 20):
                other.write(data)
        return 0

    return run


WHAT = {
    "rival_to_hf": rival_to_hf,
    "fp32": to_hf("fp32"),
    "bf16": to_hf("bf16"),
    "rival_to_universal": rival_to_universal,
    "import_zero": import_zero,
    "own_to_hf": own_to_hf,
    "plain_copy": plain_copy,
}


def recipe(run_dir: Path, model: Path):
    """A run that an import can be committed to."""
    from megablip.config import parse_config

    return parse_config(
        {
            "stage": "pretrain", "run_dir": str(run_dir), "duration": "1000 steps", "model": {"path": str(model)},
            "data": {
                "sources": [{"name": "none", "shards": "none.tar", "schema": "text", "weight": 1}],
                "sequence_length": 1, "max_tiles": 1,
            },
            "batch": {"lanes": 1},
            "optimizer": {"lr": 1e-4},
        },
        where="bench",
    )  # fmt: skip


class _Peak(threading.Thread):
    """Anonymous memory above that at the start, watched every 2 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self._start = self._now()
        self.bytes, self._ended = 0, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.002):
            self.bytes = max(self.bytes, self._now() - self._start)

    def end(self) -> int:
        self._ended.set()
        self.join()
        return self.bytes

    def _now(self) -> int:
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _moved() -> int:
    return sum(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines()[:2])


def _sync(output: Path) -> None:
    for path in output.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def main() -> None:
    what, source, output, *sync = sys.argv[1:]
    told, sys.stdout = sys.stdout, sys.stderr  # conversions talk
    run = WHAT[what](Path(source), Path(output))
    if not sync:
        os.fsync = os.fdatasync = lambda file: None
    for _ in sys.stdin:
        peak, before, began = _Peak(), _moved(), time.perf_counter()
        peak.start()
        mapped = run()
        if sync:
            _sync(Path(output))
        seconds = time.perf_counter() - began
        result = {"seconds": seconds, "memory": peak.end(), "bytes": _moved() - before + mapped}
        print(json.dumps(result), file=told, flush=True)


if __name__ == "__main__":
    main()
