"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from megablip.engine.signals import StopSignal
from megablip.engine.status import ATTEMPT

# Sends itself each signal named on the command line, says what it remembers, and goes on.
SCRIPT = """
import os, sys, time
from megablip.engine.signals import ECHO_S, StopSignal
stop = StopSignal().install()
print(stop.received, flush=True)
for number in sys.argv[1:]:
    os.kill(os.getpid(), int(number))
    time.sleep({pause})
    print(stop.received, flush=True)
"""
# Its main thread waits in C, as in a collective: for a mutex that it holds itself.
HANGING = """
import ctypes, os, subprocess, sys
from megablip.engine.signals import ECHO_S, StopSignal
StopSignal().install()
kill = f"import os, time; os.kill({os.getpid()}, 15); time.sleep({2 * ECHO_S}); os.kill({os.getpid()}, 15)"
subprocess.Popen([sys.executable, "-c", kill])
mutex = ctypes.create_string_buffer(64)
for _ in "ab":
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def run(*signals: int, pause: str = "2 * ECHO_S") -> tuple[int, list[int]]:
    script = SCRIPT.replace("{pause}", pause)
    done = subprocess.run([sys.executable, "-c", script, *map(str, map(int, signals))], capture_output=True, text=True)
    return done.returncode, [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_the_first_signal_is_remembered(number):
    assert run(number) == (0, [0, number])


def test_the_second_ends_the_process():
    assert run(signal.SIGUSR1, signal.SIGTERM) == (128 + signal.SIGTERM, [0, signal.SIGUSR1])


def test_the_second_is_left_to_the_launcher_that_started_the_rank(monkeypatch):
    monkeypatch.setenv(ATTEMPT, "1-abc")
    assert run(signal.SIGUSR1, signal.SIGTERM) == (0, [0, signal.SIGUSR1, signal.SIGUSR1])


def test_an_echo_is_the_same_request():
    """Under torchrun a Ctrl-C comes twice."""
    assert run(signal.SIGINT, signal.SIGTERM, pause="0") == (0, [0, signal.SIGINT, signal.SIGINT])


def test_the_second_ends_a_process_that_hangs():
    done = subprocess.run([sys.executable, "-c", HANGING], timeout=60)
    assert done.returncode == 128 + signal.SIGTERM


def test_one_that_comes_before_it_can_be_heeded_waits():
    """Whoever starts ranks blocks signals for as long as they would be killed by one."""
    script = SCRIPT.replace("stop = ", "os.kill(os.getpid(), 10); time.sleep(0.1)\nstop = ").replace("{pause}", "0")
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, StopSignal.SIGNALS),
    )
    assert (done.returncode, done.stdout.split()) == (0, [str(int(signal.SIGUSR1))])
