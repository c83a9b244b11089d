"""Checkpoints of real runs on disks that fill up and that flip bits."""

from __future__ import annotations

import random
import shutil
import time

import pytest

from megablip.checkpoint.commit import committed, open_checkpoint
from megablip.config import dump_config, load_config
from megablip.metrics.points import read_metrics
from tests.distributed import runs
from tests.faults.victims import Nursery


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as nursery:
        yield nursery


def start(nursery, work, run_dir, log, **changes):
    recipe = runs.make_recipe(work, run_dir=str(run_dir), data__decode_workers=0, **changes)
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(dump_config(load_config(recipe)))
    return nursery.start(run_dir / "config.yaml", ranks=2, log=log)


def wait_for(happened, victim):
    deadline = time.monotonic() + 120
    while not happened():
        assert victim.running, victim.output()[-3000:]
        assert time.monotonic() < deadline, victim.output()[-3000:]
        time.sleep(0.01)


@pytest.mark.parametrize("small_disk", ["8m"], indirect=True)
def test_a_disk_that_fills_up_costs_checkpoints_only_while_it_is_full(nursery, work, small_disk, tmp_path):
    steps = 2000
    victim = start(
        nursery, work, small_disk / "run", tmp_path / "log", duration=f"{steps} steps", checkpoint__every_steps=3
    )
    folder = small_disk / "run" / "checkpoints"
    wait_for(lambda: len(committed(folder)) == 2, victim)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"x" * 4096)
        except OSError:
            pass
    wait_for(lambda: "training goes on" in victim.output(), victim)
    full = committed(folder)
    assert full
    for path in full:
        open_checkpoint(path)
    assert (folder / "latest").read_text() == full[-1].name
    said = next(line for line in victim.output().splitlines() if "training goes on" in line)
    assert "No space left on device" in said
    filler.unlink()
    wait_for(lambda: committed(folder) and committed(folder)[-1] > full[-1], victim)
    open_checkpoint(committed(folder)[-1])
    victim.kill()


@pytest.mark.slow
def test_one_flipped_byte_in_any_file_is_found_and_the_checkpoint_before_taken(nursery, work, tmp_path):
    """Each file of a checkpoint in turn, by real resumes that then end as an unbroken run does; 10 s a file."""
    rng, whole = random.Random(5), tmp_path / "whole"
    changes = {"duration": "12 steps", "checkpoint__every_steps": 3, "checkpoint__keep": 9}
    start(nursery, work, whole, tmp_path / "whole.log", **changes).wait(300)
    steps = [int(path.name.removeprefix("step_")) for path in committed(whole / "checkpoints")]
    newest, before = steps[-1], steps[-2]
    names = sorted(path.name for path in (whole / "checkpoints" / f"step_{newest:08d}").iterdir())
    assert len(names) == 6, names
    for number, name in enumerate(names):
        run_dir = tmp_path / f"damaged-{number}"
        shutil.copytree(whole, run_dir)
        path = run_dir / "checkpoints" / f"step_{newest:08d}" / name
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        victim = start(nursery, work, run_dir, tmp_path / f"{number}.log", **changes)
        victim.wait(300)
        damaged = [line for line in victim.output().splitlines() if "is damaged" in line]
        assert len(damaged) == 1, victim.output()[-3000:]
        assert name in damaged[0]
        assert f"resumed from step_{before:08d}" in victim.output()
        assert runs.losses(run_dir) == runs.losses(whole)
        assert len(read_metrics(run_dir)) == 12
