"""The clock's laps make up the time since the user's command."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from megablip.metrics import startup
from megablip.metrics.startup import StartClock, process_age_s


def test_laps_make_up_the_time_since_the_command(monkeypatch):
    monkeypatch.setenv(startup.STARTED, str(time.time() - process_age_s() - 100))
    clock = StartClock()
    clock.lap("engine")
    assert list(clock.laps) == ["launcher", "imports", "engine"]
    assert clock.laps["launcher"] == pytest.approx(100, abs=0.1)
    assert str(clock).startswith(f"first step after {sum(clock.laps.values()):.1f} s: launcher 100.0, imports ")


def test_the_age_of_a_process():
    script = "from megablip.metrics.startup import process_age_s; print(process_age_s())"
    began = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert 0 <= age <= time.monotonic() - began + 0.02
    assert process_age_s() > age
