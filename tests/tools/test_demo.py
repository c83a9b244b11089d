"""`make hello`, the whole path at its smallest, and what the demo remembers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.distributed.runs import REPOSITORY, environment
from tools.demo import DEMO, HELLO, Demo, Stage, stages


def test_hello_trains_and_answers_one_image(tmp_path):
    command = [sys.executable, "-m", "tools.demo", "--hello", "--folder", str(tmp_path / "hello")]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    *_, last = done.stdout.splitlines()
    assert last.startswith("hello: image ")
    loss = next(line for line in done.stdout.splitlines() if line.startswith("loss: "))
    first, final = (float(word) for word in loss.split() if word.replace(".", "").isdigit())
    assert final < 0.9 * first
    assert (tmp_path / "hello" / "report" / "report.html").read_text().count("<figure") == 1

    again = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=60)
    assert again.stdout.count("done before") == len(stages(HELLO, tmp_path))
    assert again.stdout.splitlines()[-1] == last


def mark(tmp_path, name: str, code: int = 0) -> Stage:
    """A stage that writes its name to a log, makes its folder, and refuses one that is there."""
    output = tmp_path / f"output-{name}"
    script = f"open({str(tmp_path / 'log')!r}, 'a').write({name!r}); import os; {code} or os.mkdir({str(output)!r}); "
    return Stage(name, output, [sys.executable, "-c", f"{script} raise SystemExit({code})"])


def test_a_failed_stage_is_run_again_and_those_before_it_are_not(tmp_path):
    first, second = mark(tmp_path, "a"), mark(tmp_path, "b")
    with pytest.raises(SystemExit) as stopped:
        Demo(tmp_path).run([first, mark(tmp_path, "b", code=3)])
    assert stopped.value.code == 3
    Demo(tmp_path).run([first, second])
    assert (tmp_path / "log").read_text() == "abb"


def test_a_changed_stage_takes_the_later_ones_with_it(tmp_path):
    Demo(tmp_path).run([mark(tmp_path, "a"), mark(tmp_path, "b")])
    before = mark(tmp_path, "a")
    changed = Stage("a", before.output, [*before.command, "changed"])
    Demo(tmp_path).run([changed, mark(tmp_path, "b")])
    assert (tmp_path / "log").read_text() == "abab"
    assert set(json.loads((tmp_path / "stages.json").read_text())) == {"a", "b"}


def test_the_demo_trains_on_two_ranks_for_the_recipes_tokens(tmp_path):
    train = next(stage for stage in stages(DEMO, tmp_path) if stage.name == "train")
    assert not any(word.startswith(("engine.", "duration=")) for word in train.command)
