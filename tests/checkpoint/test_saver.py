"""Saving beside training: two ranks as threads, a loop without a model, files as they are."""

from __future__ import annotations

import errno
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megablip.checkpoint import saver as saver_module
from megablip.checkpoint.commit import CheckpointStore, committed, open_checkpoint
from megablip.checkpoint.saver import Saver
from megablip.checkpoint.slices import SliceReader, write_slices
from megablip.config import parse_config
from megablip.engine.progress import Progress
from megablip.errors import CheckpointError, ConfigError
from megablip.records import MASTER, LocalSlice
from tests.minimal import RECIPE

BASE = {"model": "m", "sampler": '{"kind": "perceiver"}'}

WORLD, SIZE = 2, 10


class Meeting:
    """A process group of threads."""

    def __init__(self):
        self.barrier = threading.Barrier(WORLD, timeout=20)
        self.values = [None] * WORLD


class ThreadTopology(SimpleNamespace):
    """Topology of one such rank; a collective in a checkpoint's thread is an error."""

    def gather(self, value):
        assert threading.current_thread().name.startswith("rank"), "a collective beside the loop"
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        values = list(self.meeting.values)
        self.meeting.barrier.wait()
        return values


class Engine:
    """Weights that are the step's number; `stepping` overwrites them in place, as an optimizer does."""

    def __init__(self, rank):
        self.start, self.end = (0, 6) if rank == 0 else (6, SIZE)
        self.values = torch.zeros(self.end - self.start)

    def stepping(self, step):
        self.values.fill_(step)

    def local_slices(self):
        yield LocalSlice("w", (SIZE,), self.start, self.end, {MASTER: self.values})

    def adam_step(self):
        return int(self.values[0])

    def group_settings(self):
        return [{"lr": 0.1, "weight_decay": 0.0}]


class Run:
    """The loop of megablip.train, as far as checkpoints go.

    Args:
        paced: whether a step is long enough for what goes on beside it to end.
    """

    def __init__(
        self, folder, steps, each_step=lambda rank, step: None, *, paced=lambda: True, final=True, **checkpoint
    ):
        self.folder, self.steps, self.each_step, self.paced, self.final = folder, steps, each_step, paced, final
        self.config = parse_config(RECIPE | {"checkpoint": {"every_steps": 1000, "keep": 2} | checkpoint}, "test")
        self.meeting, self.said, self.errors, self.savers = Meeting(), [], [None] * WORLD, [None] * WORLD

    def go(self):
        threads = [threading.Thread(target=self.rank, args=(rank,), name=f"rank {rank}") for rank in range(WORLD)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self

    def rank(self, rank):
        try:
            self.loop(rank)
        except Exception as error:
            self.errors[rank] = error
            if not isinstance(error, CheckpointError):  # which all ranks raise
                self.meeting.barrier.abort()

    def loop(self, rank):
        topology = ThreadTopology(
            rank=rank, world=WORLD, is_first=rank == 0, device=torch.device("cpu"), meeting=self.meeting
        )
        engine, progress, lanes = Engine(rank), Progress(), None
        store = CheckpointStore(self.folder, self.config.checkpoint.keep, topology)
        say = self.said.append if rank == 0 else lambda text: None
        saver = self.savers[rank] = Saver(self.config, store, engine, progress, topology, BASE, say)
        for _ in range(self.steps):
            if self.paced() and saver._flight and saver._flight.task:
                saver._flight.task.join()
            reports = topology.gather(saver.report())
            total = SimpleNamespace(**{name: sum(report[name] for report in reports) for name in reports[0]})
            progress.step += 1
            engine.stepping(progress.step)
            lanes = {rank: np.array([progress.step])}
            saver.maybe_save(total, lanes)
            self.each_step(rank, progress.step)
        if self.final:
            saver.finish(lanes)


def assert_checkpoint_of(folder, step):
    """All of it is of one step edge."""
    checkpoint = open_checkpoint(folder / f"step_{step:08d}")
    assert checkpoint.trainer_state["progress"]["step"] == checkpoint.trainer_state["adam_step"] == step
    assert SliceReader(checkpoint.folder).whole("w").tolist() == [step] * SIZE
    assert checkpoint.lane_states() == {0: np.array([step]), 1: np.array([step])}
    return checkpoint


def steps_of(folder):
    return [int(path.name.removeprefix("step_")) for path in committed(folder)]


class HeldWrites:
    """Ranks' writes wait until `go` is set; those of steps in `fail` fail afterwards."""

    def __init__(self, monkeypatch, fail=(), error=None, ranks=range(WORLD)):
        self.go, self.began, self.fail, self.ranks = threading.Event(), threading.Event(), fail, ranks
        self.error = error or OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(saver_module, "write_slices", self.write)

    def write(self, path, slices, rng):
        self.began.set()
        rank = int(path.stem.removeprefix("rank_"))
        if rank in self.ranks:
            assert self.go.wait(20)
            if int(path.parent.stem.removeprefix("step_")) in self.fail:
                path.write_bytes(b"half")
                raise self.error
        return write_slices(path, slices, rng)


def test_steps_that_are_due_are_saved_and_the_last(tmp_path):
    run = Run(tmp_path, steps=20, every_steps=8, keep=9).go()
    assert run.errors == [None, None]
    assert steps_of(tmp_path) == [8, 16, 20]
    for step in (8, 16, 20):
        checkpoint = assert_checkpoint_of(tmp_path, step)
    assert checkpoint.trainer_state["groups"] == [{"lr": 0.1, "weight_decay": 0.0}]
    assert set(checkpoint.trainer_state["versions"]) == {"python", "megablip", "torch", "deepspeed", "transformers"}
    assert (tmp_path / "latest").read_text() == "step_00000020"
    assert [text.split(" (")[0] for text in run.said] == [f"saved {tmp_path}/step_{n:08d}" for n in (8, 16, 20)]


@pytest.mark.parametrize("slow", [0, 1])
def test_nothing_is_committed_before_all_ranks_have_written(tmp_path, monkeypatch, slow):
    """The weights move on meanwhile, and the checkpoint has those of its step."""
    writes, seen = HeldWrites(monkeypatch, ranks=[slow]), []

    def each_step(rank, step):
        if rank == slow and step == 9:
            seen.append((steps_of(tmp_path), (tmp_path / "latest").exists(), writes.began.wait(20)))
        if step == 10:
            writes.go.set()

    run = Run(tmp_path, 20, each_step, paced=writes.go.is_set, every_steps=2, keep=99).go()
    assert run.errors == [None, None]
    assert seen == [([], False, True)]
    assert steps_of(tmp_path)[:2] == [2, 12], "12: the first edge after its commit was heard of"
    for step in steps_of(tmp_path):
        assert_checkpoint_of(tmp_path, step)


def test_a_save_that_is_due_while_one_is_in_flight_is_postponed(tmp_path, monkeypatch):
    writes = HeldWrites(monkeypatch)

    def each_step(rank, step):
        if step == 7:
            writes.go.set()

    run = Run(tmp_path, 20, each_step, paced=writes.go.is_set, every_steps=3, keep=99).go()
    assert run.errors == [None, None]
    assert "the checkpoint of step 6 waits for that of step 3 to be written" in run.said
    # The write ends after step 7, edge 8 begins the commit, edge 9 hears of it.
    assert steps_of(tmp_path) == [3, 9, 12, 15, 18, 20]
    for step in steps_of(tmp_path):
        assert_checkpoint_of(tmp_path, step)


def test_the_end_waits_for_the_save_in_flight_and_does_not_save_a_step_twice(tmp_path, monkeypatch):
    writes = HeldWrites(monkeypatch)
    threading.Timer(0.3, writes.go.set).start()
    run = Run(tmp_path, 6, paced=writes.go.is_set, every_steps=6).go()
    assert run.errors == [None, None]
    assert steps_of(tmp_path) == [6]
    assert len(run.said) == 1
    assert_checkpoint_of(tmp_path, 6)


def test_nothing_is_saved_where_no_step_was_made(tmp_path):
    assert Run(tmp_path, 0).go().errors == [None, None]
    assert steps_of(tmp_path) == []


def test_a_full_disk_is_reported_once_and_the_next_save_tries_again(tmp_path, monkeypatch):
    writes = HeldWrites(monkeypatch, fail=[4], ranks=[1])
    writes.go.set()
    run = Run(tmp_path, 40, every_steps=4, keep=99).go()
    assert run.errors == [None, None]
    reports = [text for text in run.said if "not saved" in text]
    assert len(reports) == 1
    for words in ("training goes on", "No space left on device", "rank 1", "free space"):
        assert words in reports[0]
    assert 4 not in steps_of(tmp_path)
    assert steps_of(tmp_path)[-1] == 40
    assert not list(tmp_path.glob("*.tmp"))
    for step in steps_of(tmp_path):
        assert_checkpoint_of(tmp_path, step)


def test_a_commit_that_fails_is_reported_too(tmp_path, monkeypatch):
    real, failed = CheckpointStore.commit, []

    def commit(self, step, trainer_state):
        if not failed:
            failed.append(step)
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        real(self, step, trainer_state)

    monkeypatch.setattr(CheckpointStore, "commit", commit)
    run = Run(tmp_path, 40, every_steps=4, keep=99).go()
    assert run.errors == [None, None]
    assert ["Disk quota exceeded" in text for text in run.said if "not saved" in text] == [True]
    assert failed[0] not in steps_of(tmp_path)
    assert_checkpoint_of(tmp_path, 40)


def test_the_end_fails_on_all_ranks_if_the_last_step_cannot_be_saved(tmp_path, monkeypatch):
    writes = HeldWrites(monkeypatch, fail=[9], ranks=[0])
    writes.go.set()
    run = Run(tmp_path, 9, every_steps=4)
    run.go()
    for error in run.errors:
        assert isinstance(error, CheckpointError)
        assert "No space left on device" in error.what
        assert "rank 0" in error.where
    assert steps_of(tmp_path) == [4, 8]
    assert not list(tmp_path.glob("*.tmp"))


def test_the_end_tries_again_what_failed_in_flight(tmp_path, monkeypatch):
    tries = []

    def write(path, slices, rng):
        tries.append(path.name)
        if tries.count(path.name) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_slices(path, slices, rng)

    monkeypatch.setattr(saver_module, "write_slices", write)
    run = Run(tmp_path, 5, every_steps=5).go()
    assert run.errors == [None, None]
    assert_checkpoint_of(tmp_path, 5)


def test_a_bug_ends_the_run_and_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    writes = HeldWrites(monkeypatch, fail=[4], error=KeyError("bug"), ranks=[1])
    writes.go.set()
    run = Run(tmp_path, 400, every_steps=4).go()
    assert isinstance(run.errors[1], KeyError)


def test_the_first_ranks_clock_decides(tmp_path, monkeypatch):
    clock = {"rank 0": 0.0, "rank 1": 1e9}
    monkeypatch.setattr(saver_module.time, "monotonic", lambda: clock[threading.current_thread().name])

    def each_step(rank, step):
        clock[f"rank {rank}"] += 20.0 if rank == 0 else 999.0

    run = Run(tmp_path, 20, each_step, every_minutes=2, keep=99, final=False).go()
    assert run.errors == [None, None]
    # After 6 steps of 20 s, by a report that is sent before the seventh.
    assert sorted(path.name[:13] for path in tmp_path.glob("step_*"))[0] == "step_00000007"


def test_what_a_killed_run_left_is_swept_at_the_start(tmp_path):
    leftover = tmp_path / "step_00000003.tmp"
    leftover.mkdir()
    (leftover / "rank_00000.safetensors").write_bytes(b"half")
    run = Run(tmp_path, 1).go()
    assert run.errors == [None, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_the_copy_uses_its_memory_again():
    copy, engine = saver_module._HostCopy(pinned=False), Engine(0)
    places = set()
    for step in (1, 2):
        engine.stepping(step)
        (piece,) = copy.take(engine.local_slices)
        assert piece.tensors[MASTER].tolist() == [step] * 6
        places.add(piece.tensors[MASTER].data_ptr())
    assert len(places) == 1
    assert engine.values.data_ptr() not in places


def test_the_copy_lies_in_blocks_of_a_power_of_two(monkeypatch):
    """torch rounds pinned memory up to one: a single piece of 12 bytes a parameter could take twice as much."""
    monkeypatch.setattr(saver_module, "_BLOCK_ELEMENTS", 8)
    lengths = (5, 3, 5, 12, 3, 1)
    slices = [
        LocalSlice(str(number), (length,), 0, length, {MASTER: torch.full((length,), float(number))})
        for number, length in enumerate(lengths)
    ]
    copy = saver_module._HostCopy(pinned=False)
    places = []
    for _ in range(2):
        copied = copy.take(lambda: slices)
        assert [piece.tensors[MASTER].tolist() for piece in copied] == [
            [float(number)] * length for number, length in enumerate(lengths)
        ]
        places.append([piece.tensors[MASTER].data_ptr() for piece in copied])
    assert places[0] == places[1]
    assert [len(block) for block in copy._blocks] == [8, 8, 16]


def changed(**changes):
    raw = RECIPE | {key: value for key, value in changes.items() if "." not in key}
    return parse_config(raw | {"optimizer": RECIPE["optimizer"] | changes.get("optimizer", {})}, "test")


def test_a_changed_run_is_refused_unless_the_change_is_named(tmp_path):
    Run(tmp_path, 1).go()
    checkpoint = open_checkpoint(tmp_path / "step_00000001")
    same = BASE
    checkpoint.check(changed(), same)
    checkpoint.check(changed(run_dir="elsewhere"), same)
    with pytest.raises(ConfigError, match=r"optimizer.lr: 0.001 -> 0.5") as caught:
        checkpoint.check(changed(optimizer={"lr": 0.5}), same)
    assert str(checkpoint.folder) in caught.value.where
    assert "allow_changes" in caught.value.remedy
    checkpoint.check(changed(optimizer={"lr": 0.5}, allow_changes=["optimizer"]), same)
    with pytest.raises(ConfigError, match="lanes: 4 -> 8"):
        checkpoint.check(changed(batch={"lanes": 8}, allow_changes=["optimizer"]), same)
    with pytest.raises(CheckpointError, match="model is not the one") as caught:
        checkpoint.check(changed(), same | {"model": "other"})
    assert "allow_changes=[model.path]" in caught.value.remedy
    checkpoint.check(changed(allow_changes=["model.path"]), same | {"model": "other"})
    with pytest.raises(CheckpointError, match=r"sampler is .*fixed.*, and this run trains .*perceiver"):
        checkpoint.check(changed(), same | {"sampler": '{"kind": "fixed"}'})
