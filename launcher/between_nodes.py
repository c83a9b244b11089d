"""What nodes can only tell together: clocks, shared folders, and sums over the network between every two of them.

One process on each node runs this.  They meet at the address and port that the
ranks will meet at, so that these are tried too.  A node that is missing, late or
broken costs the others a bounded time, and is named.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import DistError, PrefixStore, TCPStore

from megablip.engine.topology import computes_on_gpu

ARRIVE_S = 60.0  # after the first node; all of them may read Python over a cold network file system
SEEN_S = 15.0  # until a file that was written on one node must be seen on all
PAIR_S = 20.0  # for two nodes to connect, and for a sum
WAIT_S = 60.0  # for a node without a sign of life; one that a broken node holds up gives signs, but while it connects
GIVE_UP_AFTER = 2  # failures with different nodes, after which a node is taken to be at fault itself
REPEATS = 4  # of a sum; the first one is not timed
VALUES = {"cpu": 2 << 20, "cuda": 64 << 20}  # fp32: 8 and 256 MiB, with which bandwidth is near its best
CLOCK_ROUNDS = 3


@dataclass(frozen=True)
class Meeting:
    """Where the nodes meet, and which of them this one is."""

    address: str
    port: int
    number: int
    nodes: int
    node: str
    nonce: str


@dataclass(frozen=True)
class Sum:
    """One all-reduce between two nodes, as one of them saw it; `other` is a node's number."""

    other: int
    device: str
    gb_per_s: float = 0.0
    error: str = ""


class NoMeeting(Exception):
    """The first node's port can't be had, or not be reached; says why."""


def meet(meeting: Meeting) -> PrefixStore:
    """The nodes' common store.

    Raises:
        NoMeeting: on the first node: the port is taken; elsewhere: nobody answers there.
    """
    try:
        store = TCPStore(
            meeting.address,
            meeting.port,
            meeting.nodes,
            is_master=meeting.number == 0,
            timeout=timedelta(seconds=ARRIVE_S),
            wait_for_workers=False,
        )
    except (DistError, RuntimeError) as error:
        if meeting.number == 0 and (os.strerror(errno.EADDRINUSE) in str(error) or "EADDRINUSE" in str(error)):
            raise NoMeeting(f"port {meeting.port} is taken by another program") from None
        raise NoMeeting(_first_line(error)) from None

    # Where the first node could not have its port, another job's store may answer there.
    return PrefixStore(meeting.nonce, store)


class Together:
    """The nodes that have arrived.

    Raises:
        NoMeeting: this node comes too late, or the first one is gone.
    """

    def __init__(self, meeting: Meeting, store: PrefixStore):
        self.meeting, self._store = meeting, store
        store.set(f"here/{meeting.number}", meeting.node)
        try:
            if meeting.number == 0:
                store.set("members", json.dumps(self._arrived()))
            self.members: list[int] = json.loads(self._get("members", ARRIVE_S + 10))
        except (DistError, RuntimeError) as error:
            late = "the first node stopped answering, or had ended its checks before this one was ready"
            raise NoMeeting(f"{late}: {_first_line(error)}") from None
        if meeting.number not in self.members:
            raise NoMeeting(f"this node took longer than {ARRIVE_S:.0f} s to get ready; the others began without it")

    def _arrived(self) -> list[int]:
        deadline = time.monotonic() + ARRIVE_S
        there: set[int] = set()
        while len(there) < self.meeting.nodes and time.monotonic() < deadline:
            there |= {n for n in range(self.meeting.nodes) if n not in there and self._store.check([f"here/{n}"])}
            time.sleep(0.02)
        return sorted(there)

    def _get(self, key: str, limit_s: float) -> bytes:
        self._store.wait([key], timedelta(seconds=limit_s))
        return self._store.get(key)

    def clock_s(self) -> float:
        """Seconds that this node's clock is ahead of the first one's; an error of a few milliseconds adds to it."""
        offsets = []
        for turn in range(CLOCK_ROUNDS):
            key = f"clock/{turn}"
            self._store.add(f"{key}/ready", 1)
            if self.meeting.number == 0:
                deadline = time.monotonic() + PAIR_S
                while self._store.add(f"{key}/ready", 0) < len(self.members) and time.monotonic() < deadline:
                    time.sleep(0.005)
                self._store.set(key, repr(time.time()))
            sent = float(self._get(key, 2 * PAIR_S))
            offsets.append(time.time() - sent)
        return min(offsets, key=abs)

    def unseen(self, folder: Path) -> list[int]:
        """Nodes whose file in a shared folder this one does not see; all of them write one, at the same time."""
        own = folder / f".seen.{self.meeting.nonce}.{self.meeting.number}"
        with suppress(OSError):  # told by the check of the folder itself, and by the others
            own.write_text(self._word(self.meeting.number))
        self._barrier("written")
        missing = set(self.members)
        deadline = time.monotonic() + SEEN_S
        while missing:
            for number in sorted(missing):
                with suppress(OSError):
                    path = folder / f".seen.{self.meeting.nonce}.{number}"
                    if path.read_text() == self._word(number):
                        missing.discard(number)
            if not missing or time.monotonic() > deadline:
                break
            time.sleep(0.2)  # attributes of a network file system may be cached for some seconds
        self._barrier("read", SEEN_S + PAIR_S)
        with suppress(OSError):
            own.unlink()
        return sorted(missing)

    def _word(self, number: int) -> str:
        return f"{self.meeting.nonce} {number}"

    def sums(self, devices: list[str]) -> Iterator[Sum]:
        """All-reduce with every other node in turn: correct to the last bit, and how fast.

        Args:
            devices: of this node, as many on all; over all turns each of them is used.
        """
        number, failed, order = self.meeting.number, set(), turns(self.members, self.meeting.number)
        at_once = -(-len(devices) // max(len(order), 1))
        for turn, other in enumerate(order):
            for slot in range(at_once):
                device = devices[(turn * at_once + slot) % len(devices)]
                try:
                    if not self._comes(other, f"turn/{slot}"):
                        yield Sum(other, device, error="it had given up before")
                        break
                    yield self._sum(other, slot, device)
                except Exception as error:  # gloo and NCCL raise several kinds, and all mean the same here
                    yield Sum(other, device, error=_first_line(error))
                    failed.add(other)
                    break
            if len(failed) == GIVE_UP_AFTER:
                self._store.set(f"out/{number}", "")
                return

    def _comes(self, other: int, turn: str) -> bool:
        """Wait for the other node, which a broken one may hold up; False if it has given up.

        Raises:
            RuntimeError: it gives no sign of life; nobody waits for it any more.
        """
        own = self.meeting.number
        self._store.set(f"{turn}/{own}/{other}", "")
        seen, since = -1, time.monotonic()
        while not self._store.check([f"{turn}/{other}/{own}"]):
            if self._store.check([f"out/{other}"]):
                return False
            self._store.add(f"alive/{own}", 1)
            sign = self._store.add(f"alive/{other}", 0)
            if sign != seen:
                seen, since = sign, time.monotonic()
            elif time.monotonic() - since > WAIT_S:
                self._store.set(f"out/{other}", "")
                raise RuntimeError(f"no sign of life for {WAIT_S:.0f} s")
            time.sleep(0.005)
        return True

    def _sum(self, other: int, slot: int, device: str) -> Sum:
        low, high = sorted((number := self.meeting.number, other))
        store, side = PrefixStore(f"sum/{low}/{high}/{slot}", self._store), int(number == high)
        group, values, seconds = _group(store, side, device), VALUES[torch.device(device).type], []
        for _ in range(REPEATS):
            # Whole numbers, whose sums fp32 holds exactly, and which differ by node and place.
            tensor = torch.arange(values, device=device).remainder_(1021).add_(1 + 2048 * number).float()
            expected = torch.arange(values, device=device).remainder_(1021).mul_(2).add_(2 + 2048 * (low + high))
            _synchronize(device)
            began = time.perf_counter()
            group.allreduce([tensor]).wait(timedelta(seconds=PAIR_S))
            _synchronize(device)
            seconds.append(time.perf_counter() - began)
            wrong = int((tensor != expected.float()).sum())
            if wrong:
                return Sum(other, device, error=f"{wrong} of {values} sums are wrong")
        group.shutdown()
        return Sum(other, device, gb_per_s=4 * values / min(seconds[1:]) / 1e9)

    def leave(self) -> None:
        """The first node keeps the store until all have done, or could have."""
        with suppress(DistError, RuntimeError):
            self._store.add("left", 1)
            if self.meeting.number == 0:
                deadline = time.monotonic() + 2 * WAIT_S
                while self._store.add("left", 0) < len(self.members) and time.monotonic() < deadline:
                    time.sleep(0.05)

    def _barrier(self, name: str, limit_s: float = PAIR_S) -> None:
        """Until all are there, or the time is over: who waits for a broken node shall go on."""
        deadline = time.monotonic() + limit_s
        self._store.add(f"barrier/{name}", 1)
        while self._store.add(f"barrier/{name}", 0) < len(self.members) and time.monotonic() < deadline:
            time.sleep(0.02)


def turns(members: list[int], own: int) -> list[int]:
    """The others, in an order in which every two members meet once and as many at a time as can (circle method)."""
    ring: list[int | None] = [*members, *([None] if len(members) % 2 else [])]
    found = []
    for _ in range(len(ring) - 1):
        place = ring.index(own)
        other = ring[len(ring) - 1 - place]
        if other is not None:
            found.append(other)
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return found


def devices() -> list[str]:
    """What the ranks of this node will compute on."""
    if computes_on_gpu():
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu"]


def _group(store: PrefixStore, side: int, device: str) -> Any:
    """A process group of two, without the ceremony of the default one, which all would have to join."""
    limit = timedelta(seconds=PAIR_S)
    if torch.device(device).type == "cpu":
        return torch.distributed.ProcessGroupGloo(store, side, 2, limit)
    torch.cuda.set_device(torch.device(device))
    # Who waits here hears of a failure, and goes on; by default a watchdog ends the process.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = limit
    return torch.distributed.ProcessGroupNCCL(store, side, 2, options)


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(torch.device(device))


Say = Callable[[dict[str, Any]], None]


def look_together(meeting: Meeting, shared: Path, say: Say) -> None:
    """Tell, as it becomes known: who is there, this node's clock, files it does not see, sums.

    Args:
        shared: folder that all nodes must see as the same.
    """
    together = Together(meeting, meet(meeting))
    say({"members": together.members})
    try:
        say({"clock_s": together.clock_s()})
        say({"unseen": together.unseen(shared)})
        for result in together.sums(devices()):
            say({"sum": vars(result)})
    except (DistError, RuntimeError) as error:
        raise NoMeeting(f"the first node stopped answering: {_first_line(error)}") from None
    together.leave()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
