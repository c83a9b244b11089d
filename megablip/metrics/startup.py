"""How long a run takes from the command to its first step, and with what."""

from __future__ import annotations

import os
import time
from pathlib import Path

STARTED = "MEGABLIP_STARTED"
"""Environment variable: seconds since the epoch at which the user's command began."""


class StartClock:
    """Laps from the command to the first step.

    Made once a rank's imports are done: that lap is counted from the moment at
    which its process began.
    """

    def __init__(self) -> None:
        self._last = time.time()
        process_began = self._last - process_age_s()
        command_began = float(os.environ.get(STARTED, process_began))
        self.laps = {"launcher": max(process_began - command_began, 0.0), "imports": self._last - process_began}

    def lap(self, name: str) -> None:
        """What was done since the last lap."""
        now = time.time()
        self.laps[name], self._last = now - self._last, now

    def __str__(self) -> str:
        laps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.laps.items())
        return f"first step after {sum(self.laps.values()):.1f} s: {laps}"


def process_age_s() -> float:
    """Seconds since this process was created (proc_pid_stat(5), field 22); psutil's are rounded to a second."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
