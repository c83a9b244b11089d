"""A checkpoint is committed or it does not exist, wherever a save ends."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megablip.checkpoint import commit
from megablip.checkpoint.commit import CheckpointStore, newest_committed, open_checkpoint
from megablip.checkpoint.slices import SliceReader, write_slices
from megablip.engine.status import RunStatus
from megablip.errors import CheckpointError, SupersededError
from megablip.records import MASTER, LocalSlice
from tests.checkpoint.alone import Alone

FILES = ["COMMITTED", "data_state.npz", "manifest.json", "rank_00000.safetensors", "trainer_state.json"]


class Killed(BaseException):
    """The process ends here: no `except Exception` runs any more."""


class DiskFull(OSError):
    def __init__(self):
        super().__init__(errno.ENOSPC, "No space left on device")


def make_store(folder, keep=2, topology=None):
    return CheckpointStore(folder, keep, topology or Alone())


def write_values(value, size=64):
    values = torch.full((size,), float(value))
    return lambda path: write_slices(path, [LocalSlice("w", (size,), 0, size, {MASTER: values})], {})


def save(store, step, **kwargs):
    return store.save(step, write_values(step, **kwargs), {0: np.array([step]), 1: np.array([7])}, {"base": "b"})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_newest_is(folder, step, reports=0):
    """A new process finds `step` whole."""
    said = []
    found = make_store(folder).newest(said.append)
    assert found.step == step
    assert len(said) == reports
    assert found.lane_states() == {0: np.array([step]), 1: np.array([7])}
    assert SliceReader(found.folder).whole("w")[0] == step


def damage(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_saved_checkpoint_is_found(tmp_path):
    assert make_store(tmp_path).newest(print) is None
    folder = save(make_store(tmp_path), 5)
    assert folder == tmp_path / "step_00000005"
    assert names(folder) == FILES
    assert_newest_is(tmp_path, 5)
    assert (tmp_path / "latest").read_text() == "step_00000005"
    assert open_checkpoint(folder).trainer_state["base"] == "b"
    manifest = (folder / "manifest.json").read_bytes()
    assert (folder / "COMMITTED").read_text() == hashlib.sha256(manifest).hexdigest()
    assert sorted(json.loads(manifest)["files"]) == ["data_state.npz", "rank_00000.safetensors", "trainer_state.json"]


def test_retention_leaves_the_newest(tmp_path):
    store = make_store(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        save(store, step)
    assert names(tmp_path) == ["latest", "step_00000003", "step_00000004"]


def test_what_a_killed_save_left_is_ignored_and_swept(tmp_path):
    save(make_store(tmp_path), 1)
    (tmp_path / "step_00000002.tmp").mkdir()
    (tmp_path / "step_00000002.tmp" / "rank_00000.safetensors").write_bytes(b"half")
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000003")
    (tmp_path / "step_00000003" / "COMMITTED").unlink()
    assert_newest_is(tmp_path, 1)
    save(make_store(tmp_path), 4)
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000004"]


# Where a save can end, in order: a call that dies, and the newest checkpoint after it.
STAGES = {
    "while a rank writes": ("rank file", 1),
    "before the manifest": ("replace manifest.json", 1),
    "before the rename": ("os.rename", 1),
    "between rename and mark": ("replace COMMITTED", 1),
    "before latest": ("replace latest", 2),
    "before an old one loses its mark": ("unlink COMMITTED", 2),
    "while an old one is deleted": ("shutil.rmtree", 2),
}


def strike(monkeypatch, call, error):
    """Make `call` raise; returns what writes the rank's file."""

    def fail(*paths, ignore_errors=False):
        if not ignore_errors:
            raise error

    def unlink(path, missing_ok=False, real=Path.unlink):
        if path.name == call.removeprefix("unlink ") and not missing_ok:
            raise error
        real(path, missing_ok)

    def replace(source, target, real=os.replace):
        if target.name == call.removeprefix("replace "):
            raise error
        real(source, target)

    if call == "rank file":
        return fail
    if call.startswith("replace "):
        monkeypatch.setattr(os, "replace", replace)
    elif call.startswith("unlink "):
        monkeypatch.setattr(Path, "unlink", unlink)
    else:
        owner, name = call.split(".")
        monkeypatch.setattr({"os": os, "shutil": shutil}[owner], name, fail)
    return write_values(2)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [Killed, DiskFull])
def test_a_save_that_ends_anywhere_loses_nothing(tmp_path, monkeypatch, stage, error):
    call, newest = STAGES[stage]
    store = make_store(tmp_path)
    for step in (0, 1):
        save(store, step)
    expected = Killed if error is Killed else CheckpointError
    with monkeypatch.context() as patch, pytest.raises(expected) as caught:
        store.save(2, strike(patch, call, error()), {0: np.array([2]), 1: np.array([7])}, {"base": "b"})
    if expected is CheckpointError:
        assert "No space left on device" in caught.value.what
        assert "free space" in caught.value.remedy
        assert "rank 0" in caught.value.where
        if newest == 1:  # the room is given back, for the next save needs it
            assert names(tmp_path) == ["latest", "step_00000000", "step_00000001"]
    assert_newest_is(tmp_path, newest)
    latest = 2 if call in ("unlink COMMITTED", "shutil.rmtree") else 1
    assert (tmp_path / "latest").read_text() == f"step_0000000{latest}"

    store = make_store(tmp_path)  # the next attempt
    for step in (2, 3):
        save(store, step)
    assert_newest_is(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000003"]


def test_a_failed_save_can_be_tried_again_by_the_same_run(tmp_path, monkeypatch):
    store = make_store(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError):
        store.save(2, strike(patch, "replace COMMITTED", DiskFull()), {}, {})
    save(store, 2)
    assert_newest_is(tmp_path, 2)


def test_a_failed_save_of_another_kind_is_not_taken_for_a_disk_that_is_full(tmp_path):
    with pytest.raises(KeyError):
        make_store(tmp_path).save(1, lambda path: {}["bug"], {}, {})
    assert make_store(tmp_path).newest(print) is None


class WithAFailedRank(Alone):
    """A second rank, whose disk is full."""

    world = 2

    def gather(self, value):
        return [value, "no space there"]


def test_the_failure_of_another_rank_is_everyones(tmp_path):
    with pytest.raises(CheckpointError, match="no space there") as caught:
        save(make_store(tmp_path, topology=WithAFailedRank()), 1)
    assert "rank 1" in caught.value.where
    assert not list(tmp_path.glob("step_*"))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_and_the_one_before_taken(tmp_path, name):
    store = make_store(tmp_path)
    for step in (1, 2):
        save(store, step)
    damage(tmp_path / "step_00000002" / name)
    said = []
    assert make_store(tmp_path).newest(said.append).step == 1
    assert "step_00000002 is damaged" in said[0]
    assert name in said[0]
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(tmp_path / "step_00000002")


@pytest.mark.parametrize("name", [name for name in FILES if name != "COMMITTED"])
def test_a_missing_or_cut_file_is_found(tmp_path, name):
    save(make_store(tmp_path), 1)
    path = tmp_path / "step_00000001" / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(path.parent)
    path.unlink()
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(path.parent)


def test_all_damaged_is_an_error_that_lists_them(tmp_path):
    store = make_store(tmp_path)
    for step in (1, 2):
        damage(save(store, step) / "data_state.npz")
    with pytest.raises(CheckpointError, match="every committed checkpoint is damaged") as caught:
        make_store(tmp_path).newest(lambda text: None)
    assert "step_00000001: data_state.npz" in caught.value.what
    assert "step_00000002: data_state.npz" in caught.value.what


def test_a_state_that_unpacks_to_more_than_any_is_not_unpacked(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(save(make_store(tmp_path), 1))
    path = checkpoint.folder / "data_state.npz"
    np.savez_compressed(path, lane_00000=np.zeros(10_000, np.int64))
    monkeypatch.setattr(commit, "MAX_STATE_BYTES", 80_000)
    assert path.stat().st_size < 1000
    with pytest.raises(CheckpointError, match="unpacks to 80128 bytes"):
        checkpoint.lane_states()


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    store = make_store(tmp_path)
    for step in (1, 2):
        save(store, step)
    damage(tmp_path / "step_00000002" / "rank_00000.safetensors")
    store = make_store(tmp_path)
    assert store.newest(lambda text: None).step == 1
    save(store, 2)
    assert_newest_is(tmp_path, 2)


def test_damaged_checkpoints_do_not_push_out_whole_ones(tmp_path):
    store = make_store(tmp_path, keep=3)
    for step in (1, 5, 6):
        save(store, step)
    for step in (5, 6):
        damage(tmp_path / f"step_0000000{step}" / "manifest.json")
    store = make_store(tmp_path, keep=2)
    assert store.newest(lambda text: None).step == 1
    save(store, 3)  # asked to stop before the damaged ones' steps come again
    assert_newest_is(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000003"]


def test_another_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(commit, "FORMAT_VERSION", 99)
        save(make_store(tmp_path), 1)
    with pytest.raises(CheckpointError, match="format 99, this megablip reads"):
        make_store(tmp_path).newest(print)


def test_no_checkpoint_is_named_as_such(tmp_path):
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        newest_committed(tmp_path)
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="COMMITTED"):
        open_checkpoint(folder)


def test_a_disk_that_is_really_full(small_disk):
    store = make_store(small_disk / "checkpoints")
    save(store, 1, size=50_000)
    for step in range(2, 5):  # each finds the room that the failed one before gave back
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            save(store, step, size=300_000)
        assert "free space" in caught.value.remedy
    assert names(small_disk / "checkpoints") == ["latest", "step_00000001"]
    assert (small_disk / "checkpoints" / "latest").read_text() == "step_00000001"
    assert_newest_is(small_disk / "checkpoints", 1)
    save(store, 5, size=60_000)
    assert_newest_is(small_disk / "checkpoints", 5)


def owned_store(folder):
    """The store of a new attempt of the run in `folder`."""
    status = RunStatus(folder)
    status.begin(ranks=1)
    return CheckpointStore(folder / "checkpoints", 2, Alone(), status)


def test_a_superseded_attempt_commits_nothing_and_deletes_nothing(tmp_path):
    """What is left of it on a node that was cut off reaches the same step as the attempt that has taken over."""
    folder = tmp_path / "checkpoints"
    old = owned_store(tmp_path)
    save(old, 1)
    old.write(2, write_values(2), {0: np.array([2]), 1: np.array([7])})
    new = owned_store(tmp_path)
    new.write(2, write_values(2), {0: np.array([2]), 1: np.array([7])})
    before = names(folder)
    with pytest.raises(SupersededError):
        old.commit(2, {"base": "b"})
    old.sweep()
    assert names(folder) == before
    new.commit(2, {"base": "b"})
    assert_newest_is(folder, 2)
    new.sweep()
    assert names(folder) == ["latest", "step_00000001", "step_00000002"]


def test_an_attempt_that_is_superseded_while_it_hashes_does_not_commit(tmp_path, monkeypatch):
    old = owned_store(tmp_path)
    write_synced = commit._write_synced

    def slow(*args, **kwargs):
        if len(RunStatus(tmp_path).attempts) == 1:
            owned_store(tmp_path)
        return write_synced(*args, **kwargs)

    old.write(1, write_values(1), {0: np.array([1])})
    monkeypatch.setattr(commit, "_write_synced", slow)
    with pytest.raises(SupersededError):
        old.commit(1, {"base": "b"})
    assert commit.committed(tmp_path / "checkpoints") == []
