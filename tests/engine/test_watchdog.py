"""The watchdog, in processes of its own: it ends them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys, time
from pathlib import Path
from megablip.engine import watchdog
watchdog.GRACE_S = 2

def expired(what):
    watchdog.dump_stacks(Path(sys.argv[1]) / "stacks" / "rank_0.txt", what)
    os._exit(7)

dog = watchdog.Watchdog({"data": 0.5, "step": 60}, 60, expired)
def waits_for_ever():
    time.sleep(60)
"""


def run(tmp_path: Path, body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT + body, str(tmp_path)], capture_output=True, text=True, timeout=50
    )


def test_a_phase_that_takes_too_long_leaves_stacks_and_ends(tmp_path):
    done = run(tmp_path, "dog.enter('data'); dog.enter('step'); dog.enter('data')\nwaits_for_ever()")
    assert done.returncode == 7
    text = (tmp_path / "stacks" / "rank_0.txt").read_text()
    for place in (text, done.stderr):
        assert "'data' takes longer than its limit of 0.5 s" in place
        assert "in waits_for_ever" in place


def test_the_first_time_of_a_phase_and_what_is_left_have_time(tmp_path):
    done = run(tmp_path, "dog.enter('data'); time.sleep(1)\ndog.enter('data'); dog.leave(); time.sleep(1)\ndog.close()")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "stacks").exists()


def test_it_also_ends_a_process_whose_interpreter_is_locked(tmp_path):
    """ctypes.PyDLL calls C without giving up the lock, as broken C code does."""
    locked = "import ctypes\ndog.enter('data'); dog.enter('data')\nctypes.PyDLL(None).sleep(40)"
    done = run(tmp_path, locked)
    assert done.returncode == 1
    assert "Timeout (0:00:02.5" in done.stderr
