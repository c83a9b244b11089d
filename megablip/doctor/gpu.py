"""`megablip doctor --gpu`: the GPU paths against what they must equal, in ten minutes, as a table and one JSON.

Each check runs in a process of its own, so that a crash on the device, or
memory that runs out, is that check's result and the others go on.  Where there
is no GPU the same checks run on the CPU, at small size.

    python -m megablip.doctor.gpu NAME RESULTS.jsonl FOLDER     one check, by hand
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from megablip.doctor.result import Place, Result
from megablip.engine.topology import prepare_device

LIMITS_S = {"machine": 30, "attention": 70, "loss": 40, "engine": 110, "resume": 150, "throughput": 90, "step": 100}
"""The checks, modules beside this one, and the seconds that each may take."""

FORMAT = 1
"""Of the JSON: a number that rises when a reader of it must change."""

_OF_A_RANK = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
_LOG_LINES = 40  # of a failed check, kept in the JSON


def doctor_gpu(output: Path) -> int:
    """Run the checks, print and write what they found; 0 if all is right, else 1."""
    console, began, started = Console(), time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    found: dict[str, list[Result]] = {}
    logs: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="megablip-doctor-") as folder:
        for name, limit_s in LIMITS_S.items():
            console.print(f"{name}, at most {limit_s} s ...")
            found[name], log = run_check(name, limit_s, Path(folder) / name)
            console.print(_table(name, found[name]))
            if not all(result.ok for result in found[name]):
                logs[name] = log
                console.print(log, markup=False, highlight=False)
    machine = {result.name: result.compared for result in found["machine"]}
    wrong = [f"{name}: {result.name}" for name, results in found.items() for result in results if not result.ok]
    compared = sum(result.tolerance is not None for results in found.values() for result in results)
    report = {
        "format": FORMAT,
        "megablip": machine.get("megablip"),
        "started": started,
        "seconds": time.monotonic() - began,
        "device": {"type": machine.get("type"), "name": machine.get("device")},
        "ok": not wrong,
        "wrong": wrong,
        "checks": {name: [result.to_json() for result in results] for name, results in found.items()},
        "logs": logs,
    }
    output.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    outcome = f"{len(wrong)} wrong" if wrong else "all is right"
    print(
        f"{machine.get('device')}: {compared} comparisons in {report['seconds']:.0f} s, {outcome}; written to {output}"
    )
    return int(bool(wrong))


def run_check(name: str, limit_s: float, folder: Path) -> tuple[list[Result], str]:
    """The results of one check, run in a process of its own, and the end of what it printed.

    A process that crashes, or takes longer than `limit_s`, adds a result that has failed.
    """
    (folder / "work").mkdir(parents=True)
    results, log = folder / "results.jsonl", folder / "log.txt"
    command = [sys.executable, "-m", __name__, name, str(results), str(folder / "work")]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=_environment(name)
        )
        try:
            code = process.wait(limit_s)
            problem = f"the check's process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
        except subprocess.TimeoutExpired:
            code, problem = None, f"the check took longer than {limit_s:.0f} s and was ended"
        finally:
            _end(process)
    lines = results.read_text().splitlines() if results.exists() else []
    found = [Result(**json.loads(line)) for line in lines]
    said = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    if code != 0:
        found.append(Result.crash("the check itself", f"{problem}; it said last: {said[-1] if said else 'nothing'}"))
    return found, "\n".join(said)


def results_of(check: Callable[[Place], Iterator[Result]], place: Place) -> Iterator[Result]:
    """What a check yields, each result with the seconds it took; an error ends it, as a result that has failed."""
    began = time.perf_counter()
    try:
        for result in check(place):
            yield replace(result, seconds=time.perf_counter() - began)
            began = time.perf_counter()
    except Exception as error:
        traceback.print_exc()
        yield replace(Result.crash("the check itself", error), seconds=time.perf_counter() - began)


def main() -> None:
    """One check, in this process: its results as lines of JSON."""
    name, output, folder = sys.argv[1:]
    device = prepare_device()
    place = Place(device, device.type != "cuda", Path(folder))
    check = importlib.import_module(f"megablip.doctor.{name}").check
    with open(output, "a", buffering=1) as stream:  # a line at a time: what was found stays, whatever comes
        for result in results_of(check, place):
            stream.write(json.dumps(asdict(result)) + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of NCCL and gloo can hold up an interpreter's own exit


def _environment(name: str) -> dict[str, str]:
    """Of a check's process: one rank, whatever started this one; the attention check switches determinism on."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") and key not in _OF_A_RANK}
    if name in ("engine", "step"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        kept |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if name == "attention":
        kept.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return kept


def _end(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all that it has started, should they still run."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def _table(name: str, results: list[Result]) -> Table:
    table = Table("", "what", "compared", Column("value", justify="right"), Column("at most", justify="right"),
                  Column("s", justify="right"), "to do", title=name)  # fmt: skip
    for result in results:
        value = "" if result.value is None else f"{_number(result.value)} {result.unit}".strip()
        tolerance = "" if result.tolerance is None else _number(result.tolerance)
        table.add_row(
            "ok" if result.ok else "!!", escape(result.name), escape(result.compared), value, tolerance,
            f"{result.seconds:.1f}", "" if result.ok else escape(result.remedy),
        )  # fmt: skip
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.3g}"


if __name__ == "__main__":
    main()
