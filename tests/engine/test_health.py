"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from megablip.engine.health import StopSignal

# Sends itself each signal named on the command line, says what it remembers, and goes on.
SCRIPT = """
import os, sys
from megablip.engine.health import StopSignal
stop = StopSignal().install()
print(stop.received, flush=True)
for number in sys.argv[1:]:
    os.kill(os.getpid(), int(number))
    print(stop.received, flush=True)
"""


def run(*signals: int) -> tuple[int, list[int]]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *map(str, map(int, signals))], capture_output=True, text=True)
    return done.returncode, [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_the_first_signal_is_remembered(number):
    assert run(number) == (0, [0, number])


def test_the_second_ends_the_process():
    assert run(signal.SIGUSR1, signal.SIGTERM) == (128 + signal.SIGTERM, [0, signal.SIGUSR1])
