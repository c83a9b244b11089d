"""`make hello`, the whole path at its smallest, and what the demo remembers."""

from __future__ import annotations

import subprocess
import sys

from tests.distributed.runs import REPOSITORY, environment
from tools.demo import DEMO, HELLO, stages


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


def test_the_demo_trains_on_two_ranks_for_the_recipes_tokens(tmp_path):
    train = next(stage for stage in stages(DEMO, tmp_path) if stage.name == "train")
    assert not any(word.startswith(("engine.", "duration=")) for word in train.command)
