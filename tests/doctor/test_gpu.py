"""The doctor's checks at the size of a CPU, and what becomes of one that finds a fault, crashes or hangs."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megablip.cli import app
from megablip.doctor import attention, gpu, loss, machine, throughput
from megablip.doctor.result import Place, Result
from megablip.model.attention import interface
from tests.distributed.ranks import run_ranks

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path):
    return Place(torch.device("cpu"), small=True, folder=tmp_path)


def engine_and_step(topology) -> list[str]:
    """Of a rank: names of the results that are not right, under the strategy that is the default."""
    import tempfile

    from megablip.doctor import engine, step

    engine.STRATEGIES = ("zero3",)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(torch.device("cpu"), small=True, folder=Path(folder))
        found = [*engine.check(place), *step.check(place)]
    assert len(found) > 10
    return [result.name for result in found if not result.ok]


@pytest.mark.parametrize("check", [attention, loss, throughput], ids=lambda module: module.__name__)
def test_a_check_finds_nothing_wrong(check, place):
    found = list(gpu.results_of(check.check, place))
    assert [result for result in found if not result.ok] == []
    assert any(result.tolerance is not None for result in found)


def test_engine_and_step_find_nothing_wrong():
    assert run_ranks(1, "tests.doctor.test_gpu:engine_and_step") == [[]]


def test_a_backend_that_leaks_is_found_and_the_exit_code_says_so(monkeypatch, tmp_path, place):
    right = interface.BACKENDS["per_document"]

    def leaking(q, k, v, **arguments):
        return right(q, k, v + 1e-3 * v.mean(0), **arguments)

    monkeypatch.setitem(interface.BACKENDS, "per_document", leaking)
    report = in_process(monkeypatch, tmp_path, place, {"machine": machine, "attention": attention})
    assert report["exit_code"] == 1
    assert not report["ok"]
    leaks = [name for name in report["wrong"] if "leakage" in name]
    assert leaks == ["attention: per_document, bf16: leakage", "attention: per_document, fp32: leakage"]
    assert not [name for name in report["wrong"] if "dense" in name]


def test_a_loss_head_that_keeps_all_logits_is_found(monkeypatch, place):
    monkeypatch.setattr(loss, "next_token_loss", PlainLoss)
    wrong = [result.name for result in loss.check(place) if not result.ok]
    assert wrong == ["memory of one more token"]


class PlainLoss:
    def __init__(self, hidden, weight, labels, bias):
        self.total: torch.Tensor = loss._plain_loss(hidden, weight, bias, labels)


def test_an_error_in_a_check_keeps_what_was_found_before(place):
    def check(place):
        yield Result("one", "first")
        raise ValueError("it broke\nin two lines")

    found = list(gpu.results_of(check, place))
    assert [(result.name, result.ok) for result in found] == [("one", True), ("the check itself", False)]
    assert found[1].compared == "ValueError: it broke"


@pytest.mark.parametrize(
    ("script", "limit_s", "words"),
    [
        ("echo out of memory; exit 3", 60, ["exit code 3", "out of memory"]),
        ("kill -9 $$", 60, ["signal 9"]),
        ("sleep 60", 0.3, ["took longer than", "was ended"]),
    ],
    ids=["exits", "is killed", "hangs"],
)
def test_a_process_that_ends_badly_is_a_result(monkeypatch, tmp_path, script, limit_s, words):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho '{json.dumps(ONE_RESULT)}' > $4\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(gpu.sys, "executable", str(program))
    found, _ = gpu.run_check("engine", limit_s, tmp_path / "engine")
    assert [result.ok for result in found] == [True, False]
    for word in words:
        assert word in found[1].compared


ONE_RESULT = {"name": "a", "compared": "b", "value": 1.0, "unit": "", "tolerance": 2.0, "remedy": "", "failed": False,
              "seconds": 0.5}  # fmt: skip


def test_the_json_has_this_form(monkeypatch, tmp_path, place):
    """Readers depend on it: a change raises gpu.FORMAT."""

    class Odd:
        @staticmethod
        def check(place):
            yield Result("not a number", "with itself", float("nan"), "GiB", 1.0, "do this")

    report = in_process(monkeypatch, tmp_path, place, {"machine": machine, "odd": Odd})
    assert report.pop("exit_code") == 1
    assert report["format"] == gpu.FORMAT == 1
    assert {key: type(value).__name__ for key, value in report.items()} == {
        "format": "int", "megablip": "str", "started": "str", "seconds": "float", "device": "dict", "ok": "bool",
        "wrong": "list", "checks": "dict", "logs": "dict",
    }  # fmt: skip
    assert report["device"]["type"] == "cpu"
    assert "no GPU" in report["device"]["name"]
    assert report["wrong"] == ["odd: not a number"]
    assert report["checks"]["odd"][0].pop("seconds") >= 0
    assert report["checks"]["odd"] == [
        {"name": "not a number", "compared": "with itself (the value is nan)", "value": None, "unit": "GiB",
         "tolerance": 1.0, "remedy": "do this", "ok": False},
    ]  # fmt: skip


def test_the_checks_fit_into_ten_minutes_and_are_there():
    assert sum(gpu.LIMITS_S.values()) < 600
    for name in gpu.LIMITS_S:
        assert callable(__import__(f"megablip.doctor.{name}", fromlist=["check"]).check)


def test_checks_run_as_one_rank_whatever_started_the_doctor(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    environment = gpu._environment("engine")
    assert "SLURM_PROCID" not in environment
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")
    assert "WORLD_SIZE" not in gpu._environment("resume")


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    """All checks in their processes, on the CPU; two minutes."""
    output = tmp_path / "doctor.json"
    done = subprocess.run(
        [sys.executable, "-m", "megablip.cli", "doctor", "--gpu", "--output", str(output)],
        cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    report = json.loads(output.read_text())
    assert report["ok"]
    assert report["checks"].keys() == gpu.LIMITS_S.keys()
    assert "all is right" in done.stdout.splitlines()[-1]
    losses = [result for result in report["checks"]["resume"] if result["name"] == "losses"]
    assert [(result["value"], result["ok"]) for result in losses] == [(0, True)]


def in_process(monkeypatch, tmp_path, place, checks) -> dict:
    """The command's report, its checks run in this process."""

    def run_check(name, limit_s, folder):
        return list(gpu.results_of(checks[name].check, place)), "the log"

    monkeypatch.setattr(gpu, "LIMITS_S", dict.fromkeys(checks, 1))
    monkeypatch.setattr(gpu, "run_check", run_check)
    output = tmp_path / "doctor.json"
    result = CliRunner().invoke(app, ["doctor", "--gpu", "--output", str(output)], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return json.loads(output.read_text()) | {"exit_code": result.exit_code}
