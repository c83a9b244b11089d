"""How a rank tells the others that the run can't go on, while its main thread hangs.

A thread of each rank has its own connection to the store that the ranks met
through, beside gloo and NCCL.  Whoever knows a reason posts a `Verdict`; all
others find it there within a second and end, instead of waiting for a
collective's time-out.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from megablip.engine.topology import Topology

PERIOD_S = 0.25
TOLD_S = 3.0  # a rank waits so long for the others to have read its verdict
_VERDICT, _ACKNOWLEDGED = "verdict", "acknowledged"


@dataclass(frozen=True)
class Verdict:
    """Why the run ends."""

    text: str
    rank: int  # that found it
    dump_stacks: bool = False


class SideChannel:
    """A thread that looks for verdicts, and posts this rank's.

    Args:
        on_verdict: called in the thread with another rank's verdict; it ends the process.
        poll: called in the thread with the store, each period; for the collective alarm.
    """

    def __init__(
        self, topology: Topology, on_verdict: Callable[[Verdict], Any], poll: Callable[[Any], Any] = lambda store: None
    ):
        self._topology, self._on_verdict, self._poll = topology, on_verdict, poll
        self._outgoing: Verdict | None = None
        self._wake, self._told, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="side channel")
        self._thread.start()

    def post(self, verdict: Verdict) -> None:
        """Tell the other ranks; returns when they know, or after TOLD_S.

        Also when called from the thread itself, inside `poll`.
        """
        self._outgoing = self._outgoing or verdict
        if threading.current_thread() is self._thread:
            return  # the thread goes on to tell it
        self._wake.set()
        self._told.wait(TOLD_S)

    def close(self) -> None:
        """Before this rank leaves: then a store that is gone means nothing."""
        self._closed.set()
        self._wake.set()
        self._thread.join(TOLD_S)

    def _run(self) -> None:
        store = None
        while not self._closed.is_set():
            try:
                store = store or self._connect()
                self._look(store)
            except Exception as error:
                if self._closed.is_set() or self._outgoing:
                    break  # this rank is about to end anyway
                if store is None:
                    # The first rank, or torchrun's agent, keeps the store and can't be reached.
                    self._on_verdict(Verdict(f"the store of the ranks is gone, so rank 0 has ended: {error}", 0))
                    break
                store = None  # once more, with a new connection
            self._wake.wait(PERIOD_S)
        self._told.set()

    def _look(self, store: Any) -> None:
        self._poll(store)
        mine = self._outgoing and json.dumps(asdict(self._outgoing))
        if mine or store.check([_VERDICT]):
            found = store.compare_set(_VERDICT, "", mine).decode() if mine else store.get(_VERDICT).decode()
            store.add(_ACKNOWLEDGED, 1)
            if self._topology.is_first:
                # It keeps the store, so it must not be gone before all have read the verdict.
                end = time.monotonic() + TOLD_S
                while store.add(_ACKNOWLEDGED, 0) < self._topology.world and time.monotonic() < end:
                    time.sleep(0.02)
            self._told.set()
            self._closed.set()
            self._on_verdict(Verdict(**json.loads(found)))

    def _connect(self) -> Any:
        from torch.distributed import PrefixStore, TCPStore

        # torchrun keeps its store when it starts the ranks anew.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=10), is_master=False
        )
        return PrefixStore(f"megablip/{attempt}", store)
