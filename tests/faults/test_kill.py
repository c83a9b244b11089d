"""kill -9 of all ranks of a real run, again and again: each resume is the next victim.

MEGABLIP_KILLS sets how many kills the long test makes (200; 100 took 8 minutes on two busy cores, 53 in a save).
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from megablip.checkpoint.commit import committed, open_checkpoint
from megablip.checkpoint.slices import SliceReader
from megablip.config import dump_config, load_config
from megablip.metrics.points import read_metrics
from tests.distributed import runs
from tests.faults.victims import Nursery, Victim

RANKS, STEPS, EVERY, KEEP = 2, 30, 3, 2


@dataclass
class Chain:
    """Runs that are killed and resumed until they finish; one after the other until `kills` are made."""

    work: Path
    nursery: Nursery
    rng: random.Random
    kills: int = 0
    in_a_save: int = 0  # kills that left a save unfinished behind
    runs: list[Path] = field(default_factory=list)

    def straight(self) -> Path:
        run_dir = self.work / "unkilled"
        self.start(run_dir).wait(300)
        assert runs.outcome(run_dir) == "finished"
        return run_dir

    def start(self, run_dir: Path) -> Victim:
        run_dir.mkdir(parents=True, exist_ok=True)
        recipe = runs.make_recipe(
            self.work, run_dir=str(run_dir), duration=f"{STEPS} steps", engine__ranks=RANKS,
            data__decode_workers=0, checkpoint__every_steps=EVERY, checkpoint__keep=KEEP,
        )  # fmt: skip
        config = run_dir / "config.yaml"
        config.write_text(dump_config(load_config(recipe)))
        return self.nursery.start(config, RANKS, run_dir / f"attempt-{len(list(run_dir.glob('attempt-*')))}.log")

    def run(self, kills: int) -> None:
        """Kill at least `kills` times, half of them during a save; every run that was begun is finished."""
        while self.kills < kills or self.in_a_save < kills // 2:
            run_dir = self.work / f"killed-{len(self.runs)}"
            self.runs.append(run_dir)
            resumed_from, kept = 0, 0
            while True:
                victim = self.start(run_dir)
                enough = self.kills >= kills and self.in_a_save >= kills // 2
                if not enough:
                    self.wait_for_the_moment(run_dir, victim)
                killed = victim.running and not enough
                if killed:
                    victim.kill()
                else:
                    victim.wait(300)
                self.check_resume(victim, resumed_from)
                if not killed:
                    assert runs.outcome(run_dir) == "finished", victim.output()[-3000:]
                    break
                self.kills += 1
                self.in_a_save += unfinished(run_dir)
                resumed_from, kept = check_loss(run_dir, kept)

    def wait_for_the_moment(self, run_dir: Path, victim: Victim) -> None:
        if self.in_a_save > self.kills // 2:  # any moment, from the imports on
            end = time.monotonic() + self.rng.uniform(0, 8)
            while victim.running and time.monotonic() < end:
                time.sleep(0.005)
            return
        before = set(run_dir.glob("checkpoints/step_*.tmp"))  # a killed one's, swept by the victim
        saves, seen = self.rng.randint(1, 2), before
        while victim.running and saves:
            now = set(run_dir.glob("checkpoints/step_*.tmp"))
            saves -= bool(now - seen)
            seen = now
        time.sleep(self.rng.choice([0, 0.005, 0.02, 0.1]) * self.rng.random())

    def check_resume(self, victim: Victim, step: int) -> None:
        said = victim.output()
        if "resumed from" in said:
            assert f"resumed from step_{step:08d}" in said
        assert "damaged" not in said


def unfinished(run_dir: Path) -> bool:
    """Whether a save was in flight: not committed, or `latest` not moved, or old ones not deleted."""
    folder = run_dir / "checkpoints"
    folders = list(folder.glob("step_*"))
    whole = committed(folder)
    latest = folder / "latest"
    return (
        len(folders) > len(whole)
        or len(whole) > KEEP
        or bool(whole and (not latest.exists() or latest.read_text() != whole[-1].name))
    )


def check_loss(run_dir: Path, kept: int) -> tuple[int, int]:
    """(step of the newest checkpoint, number of committed ones), after checks of what a kill has cost."""
    whole = committed(run_dir / "checkpoints")
    for folder in whole:
        open_checkpoint(folder)
    assert len(whole) >= min(kept, 2), "never below two committed ones"
    newest = int(whole[-1].name.removeprefix("step_")) if whole else 0
    points = read_metrics(run_dir)
    lost = [point for point in points if point["step"] > newest]
    beside_a_save = sum(point["checkpoint/in_flight"] for point in lost)
    # A step's point is written before the step edge at which a save would begin.
    assert len(lost) - beside_a_save <= EVERY, f"lost steps {[point['step'] for point in lost]}"
    return newest, len(whole)


def assert_same_end(run_dir: Path, straight: Path) -> None:
    assert runs.losses(run_dir) == runs.losses(straight)
    ends = [SliceReader(folder / "checkpoints" / f"step_{STEPS:08d}") for folder in (run_dir, straight)]
    for name in ends[1].parameters:
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            assert torch.equal(ends[0].whole(name, kind), ends[1].whole(name, kind)), f"{name}|{kind}"


def kill_often(work: Path, kills: int, seed: int) -> Chain:
    with Nursery() as nursery:
        chain = Chain(work, nursery, random.Random(seed))
        straight = chain.straight()
        chain.run(kills)
    for run_dir in chain.runs:
        assert_same_end(run_dir, straight)
    return chain


def test_killed_runs_go_on_from_a_committed_step_bit_for_bit(work):
    chain = kill_often(work, kills=4, seed=0)
    assert chain.in_a_save >= 2


@pytest.mark.slow
def test_killed_very_often(work, tmp_path):
    kills = int(os.environ.get("MEGABLIP_KILLS", "200"))
    began = time.monotonic()
    for name in ("start", "data"):
        (tmp_path / name).symlink_to(work / name)
    chain = kill_often(tmp_path, kills, seed=random.SystemRandom().randrange(2**32))
    print(
        f"{chain.kills} kills, {chain.in_a_save} of them in a save, over {len(chain.runs)} runs, "
        f"{time.monotonic() - began:.0f} s"
    )
    assert chain.in_a_save >= kills // 2
