"""A conversion that is killed, or that the disk stops, leaves no output that looks whole."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megablip.convert.to_hf import zero_to_hf
from megablip.convert.verify import verify
from megablip.errors import CheckpointError
from tests.convert.test_to_hf import make_run
from tests.model.tiny import tiny_model

CALLS = ("pwrite", "fsync", "fdatasync", "rename", "ftruncate", "open")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    start = folder / "start"
    tiny_model().save_pretrained(start)
    (start / "tokenizer.json").write_text("{}")
    weights = {n: torch.randn(p.shape) for n, p in tiny_model().named_parameters() if not n.startswith("vision_tower.")}
    return make_run(folder / "run", start, weights)


@pytest.fixture(scope="module")
def moments(run_dir, tmp_path_factory):
    """How many calls that change the disk a conversion makes."""
    queue = FORK.Queue()
    child(convert_and_die, run_dir, tmp_path_factory.mktemp("count") / "out", None, queue)
    return queue.get()


def child(target, *arguments):
    process = FORK.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def convert_and_die(run_dir: Path, output: Path, moment: int | None, queue=None) -> None:
    """Convert; at the call of this number kill the process."""
    count = 0

    def counted(real):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    zero_to_hf(run_dir, output)
    if queue:
        queue.put(count)


def check_killed(run_dir: Path, folder: Path, moment: int) -> None:
    output = folder / "out"
    assert child(convert_and_die, run_dir, output, moment) == -signal.SIGKILL
    if output.exists():  # after the rename
        assert verify(output) == []
    else:
        zero_to_hf(run_dir, output)
    assert [path.name for path in folder.iterdir()] == ["out"]
    zero_to_hf(run_dir, folder / "other")
    expected = load_file(folder / "other" / "model.safetensors")
    for name, value in load_file(output / "model.safetensors").items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.97, 0.99, 1.0])
def test_a_conversion_killed_at_some_moments(tmp_path, run_dir, moments, part):
    check_killed(run_dir, tmp_path, 1 + int(part * (moments - 1)))


@pytest.mark.slow
def test_a_conversion_killed_at_every_moment(tmp_path, run_dir, moments):
    """kill -9 before each call that changes the disk, some hundred of them; a minute."""
    for moment in range(1, moments + 1):
        (folder := tmp_path / str(moment)).mkdir()
        check_killed(run_dir, folder, moment)


def test_a_limit_on_files_is_named_and_leaves_nothing(tmp_path, run_dir):
    queue = FORK.Queue()

    def convert():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            zero_to_hf(run_dir, tmp_path / "out")
        except CheckpointError as error:
            queue.put(str(error))

    assert child(convert) == 0
    assert "File too large" in queue.get()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("small_disk", ["300k"], indirect=True)
def test_a_disk_that_is_too_small_is_named_and_stays_empty(small_disk, run_dir):
    size = (run_dir.parent / "start" / "model.safetensors").stat().st_size
    (small_disk / "other").write_bytes(b"x" * (300 * 1024 - size))
    with pytest.raises(CheckpointError, match=r"bytes and [0-9,]+ are free|No space left"):
        zero_to_hf(run_dir, small_disk / "out")
    assert [path.name for path in small_disk.iterdir()] == ["other"]
