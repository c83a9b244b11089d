"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import types

from megablip.engine.status import ATTEMPT

# Under torchrun a Ctrl-C reaches a rank twice, from the terminal and from torchrun: that is one request.
ECHO_S = 0.3


class StopSignal:
    """Remembers SIGTERM, SIGINT or SIGUSR1 until the ranks agree at a step edge.

    A second one leaves at once, for a run that hangs; but not where a launcher of
    ours has started this rank: that one kills what hangs, and there signals come
    from several sides (from Slurm to each process of a job, from srun, from the
    launcher itself), which is one request.  Python runs a signal's
    handler only when the main thread is back from C, and one that waits in a
    collective is not; so the interpreter writes each signal's number to a
    socket, and a thread that reads it does the leaving.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: int = 0
        self._leaves = ATTEMPT not in os.environ

    def install(self) -> StopSignal:
        """In the main thread."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._writer = writer  # it is closed when nobody holds it
        threading.Thread(target=self._listen, args=(reader,), daemon=True, name="signals").start()
        for number in self.SIGNALS:
            signal.signal(number, self._handle)
        # Who starts ranks may have blocked them until now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
        return self

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        self.received = self.received or number

    def _listen(self, reader: socket.socket) -> None:
        first_at = None
        while True:
            for number in reader.recv(64):
                if number not in self.SIGNALS:
                    continue
                if first_at is None:
                    first_at = time.monotonic()
                elif self._leaves and time.monotonic() - first_at > ECHO_S:
                    os._exit(128 + number)
                self.received = self.received or number
