"""RUN/status.json."""

from __future__ import annotations

import errno
import json
from concurrent.futures import ThreadPoolExecutor

import filelock
import pytest

from megablip.engine import status as module
from megablip.engine.status import EXIT_CODES, RunStatus
from megablip.errors import ConfigError, SupersededError


def test_attempts_are_kept_in_order(tmp_path):
    assert RunStatus(tmp_path).attempts == []
    RunStatus(tmp_path).begin(ranks=2)
    RunStatus(tmp_path).update(outcome="stopped", last_step=7)
    RunStatus(tmp_path).begin(ranks=4)
    first, second = RunStatus(tmp_path).attempts
    assert (first["ranks"], first["outcome"], first["last_step"]) == (2, "stopped", 7)
    assert (second["ranks"], second["outcome"]) == (4, "running")
    assert set(second) == {"id", "started", "host", "pid", "ranks", "outcome"}
    assert {path.name for path in tmp_path.iterdir()} <= {"status.json", "status.lock"}


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
    assert [attempt["outcome"] for attempt in status.attempts] == ["failed"]
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
    with pytest.raises(ConfigError, match="No space left on device"):
        RunStatus(tmp_path).begin(ranks=1)


def test_a_newer_attempt_supersedes_one_which_can_still_say_how_it_ended(tmp_path):
    old = RunStatus(tmp_path)
    old.begin(ranks=2)
    old.check_owner()
    new = RunStatus(tmp_path)
    new.begin(ranks=1)
    assert [attempt["outcome"] for attempt in new.attempts] == ["failed", "running"]
    assert old.superseded_by["id"] == new.attempt
    with pytest.raises(SupersededError, match="has taken the run over"):
        old.check_owner()
    new.check_owner()
    old.end("stopped", last_step=3)
    new.fail("rank 0: no")
    assert [(attempt["outcome"], attempt.get("reason")) for attempt in new.attempts] == [
        ("stopped", "it never said how it ended"),
        ("failed", "rank 0: no"),
    ]
    assert RunStatus(tmp_path).superseded_by is None, "who belongs to no attempt owns nothing"


def test_the_first_reason_stays(tmp_path):
    status = RunStatus(tmp_path)
    status.begin(ranks=2)
    status.fail("rank 1: out of memory", last_step=4)
    status.fail("rank 0: connection lost", last_step=5)
    assert (status.current["reason"], status.current["last_step"]) == ("rank 1: out of memory", 4)


def test_attempts_that_begin_at_once_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda _: RunStatus(tmp_path).begin(ranks=1), range(24)))
    assert sorted(attempt["id"] for attempt in RunStatus(tmp_path).attempts) == sorted(ids)


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks available"), filelock.Timeout("status.lock")])
def test_without_locks_it_is_written_all_the_same(tmp_path, monkeypatch, error):
    def refuse(self):
        raise error

    monkeypatch.setattr(module.FileLock, "acquire", refuse)
    RunStatus(tmp_path).begin(ranks=1)
    assert len(RunStatus(tmp_path).attempts) == 1


def test_ranks_that_nobody_told_begin_an_attempt_of_their_own(tmp_path, monkeypatch):
    class Topology:
        is_first, world = True, 3
        gather = staticmethod(lambda value: [value] * 3)

    monkeypatch.setenv(module.ATTEMPT, "1-told")
    RunStatus.join(tmp_path, Topology)
    assert RunStatus(tmp_path).attempts == []
    monkeypatch.delenv(module.ATTEMPT)
    RunStatus.join(tmp_path, Topology)
    assert RunStatus.of_rank(tmp_path).current["ranks"] == 3
