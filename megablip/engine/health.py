"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
import types


class StopSignal:
    """Remembers SIGTERM, SIGINT or SIGUSR1 until the ranks agree at a step edge.

    A second one leaves at once, for a run that hangs.  Handlers only set a
    flag: saving happens in the loop, where all ranks can take part.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: int = 0

    def install(self) -> StopSignal:
        for number in self.SIGNALS:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
