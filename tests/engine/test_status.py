"""RUN/status.json."""

from __future__ import annotations

import json

import pytest

from megablip.engine import status as module
from megablip.engine.status import EXIT_CODES, RunStatus


def test_attempts_are_kept_in_order(tmp_path):
    assert RunStatus(tmp_path).attempts == []
    RunStatus(tmp_path).begin(ranks=2)
    RunStatus(tmp_path).update(outcome="stopped", last_step=7)
    RunStatus(tmp_path).begin(ranks=4)
    first, second = RunStatus(tmp_path).attempts
    assert (first["ranks"], first["outcome"], first["last_step"]) == (2, "stopped", 7)
    assert (second["ranks"], second["outcome"]) == (4, "running")
    assert set(second) == {"started", "host", "ranks", "outcome"}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_every_outcome_has_an_exit_code():
    assert EXIT_CODES["finished"] == 0
    assert EXIT_CODES["stopped"] == 75
    assert EXIT_CODES["failed"] == EXIT_CODES["running"] == 1
    assert set(EXIT_CODES) == set(module.Outcome.__args__)


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "{}", '"x"'])
def test_a_damaged_file_counts_as_no_attempt(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    status = RunStatus(tmp_path)
    assert status.attempts == []
    status.update(outcome="failed")
    assert status.attempts == [{"outcome": "failed"}]
    status.begin(ranks=1)
    assert len(status.attempts) == 2


def test_a_full_disk_does_not_hide_how_the_run_ended(tmp_path, monkeypatch, capsys):
    status = RunStatus(tmp_path)
    status.begin(ranks=1)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", fail)
    status.update(outcome="failed")
    assert "No space left on device" in capsys.readouterr().err
    assert json.loads((tmp_path / "status.json").read_text())["attempts"][0]["outcome"] == "running"
