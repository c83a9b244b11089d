"""Tiles from a decode worker to its rank: slots in shared memory.

A slot holds the tiles of one sequence.  The worker writes them where the rank,
and the training loop, read them; the pipe between them carries the rest.  A
slot is the worker's again once nobody holds its tiles, in whatever order that
comes about.  With none free the worker waits: so memory is bounded and nothing
is sent back but a wake-up.  The memory is anonymous and inherited by file
descriptor, so it needs no name, is not held to the size of /dev/shm, and goes
with its processes; what is never written to takes none.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import weakref

import numpy as np

from megablip.data.images import as_tiles


class TileSlots:
    """One worker's slots, as the worker or as its rank sees them.

    Args:
        descriptors: of the memory and of the eventfd that wakes the worker.
        slots: their number.
        side: of a tile, in pixels.
    """

    def __init__(self, descriptors: tuple[int, int], slots: int, side: int):
        self.descriptors, self.slots = descriptors, slots
        self._side, self._tile_bytes = side, 3 * side * side
        memory = mmap.mmap(descriptors[0], 0)
        # Of each slot 0 while it is in use, else a number that tells which was freed last.
        # Whoever has the slot writes it: the worker takes, the rank frees.
        self._freed = np.frombuffer(memory, np.int64, slots)
        self._bytes = np.frombuffer(memory, np.uint8, offset=_header_bytes(slots)).reshape(slots, -1)
        self._lent: set[int] = set()
        self._number = itertools.count(slots + 1)
        self._closing = threading.RLock()  # tiles are let go of in any thread, and in the midst of anything

    @classmethod
    def create(cls, slots: int, tiles: int, side: int) -> TileSlots:
        """Slots of `tiles` tiles each, all of them free."""
        memory = os.memfd_create("megablip-tiles")
        os.ftruncate(memory, _header_bytes(slots) + slots * tiles * 3 * side * side)
        made = cls((memory, os.eventfd(0)), slots, side)
        made._freed[:] = range(slots, 0, -1)
        return made

    # --- the worker's end ---

    def take(self, tiles: int) -> tuple[int, np.ndarray]:
        """(slot, uint8[tiles, 3, side, side]) to write to; waits until a slot is free.

        The slot is the one freed last: the fewer are in use, the more of them is in the caches.
        """
        while not self._freed[slot := int(self._freed.argmax())]:
            os.eventfd_read(self.descriptors[1])
        self._freed[slot] = 0
        return slot, self._view(slot, tiles)

    # --- the rank's end ---

    def lend(self, slot: int, tiles: int) -> np.ndarray:
        """What the worker wrote, uint8[tiles, 3, side, side]; once the array is gone the slot is the worker's again."""
        view = self._view(slot, tiles)
        self._lent.add(slot)
        weakref.finalize(view, self._free, slot).atexit = False
        return view

    @property
    def lent(self) -> int:
        """Slots whose tiles somebody holds."""
        return len(self._lent)

    def close(self) -> None:
        """Let go of the memory, which goes once no tiles are held."""
        with self._closing:
            descriptors, self.descriptors = self.descriptors, ()
            for descriptor in descriptors:
                os.close(descriptor)
            del self._freed, self._bytes

    def _view(self, slot: int, tiles: int) -> np.ndarray:
        return as_tiles(self._bytes[slot, : tiles * self._tile_bytes], self._side)

    def _free(self, slot: int) -> None:
        with self._closing:
            if self.descriptors:
                self._lent.discard(slot)
                self._freed[slot] = next(self._number)
                os.eventfd_write(self.descriptors[1], 1)


def _header_bytes(slots: int) -> int:
    return -(-slots * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
