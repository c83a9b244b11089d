"""Tiles from a decode worker to its rank: a ring in shared memory.

The worker writes tiles where the rank reads them; the pipe between them
carries the rest.  The rank frees in the order in which it was given, and a full
ring makes the worker wait: so memory is bounded and nothing is sent back but a
wake-up.  The memory is anonymous and inherited by file descriptor, so it needs
no name, is not held to the size of /dev/shm, and goes with its processes.
"""

from __future__ import annotations

import mmap
import os

import numpy as np

from megablip.data.images import as_tiles

_HEADER_BYTES = mmap.PAGESIZE  # its first number: bytes freed so far


class TileRing:
    """One worker's ring. Positions count bytes from the beginning, without end.

    Args:
        descriptors: of the memory and of the eventfd that wakes the worker.
        side: of a tile, in pixels.
    """

    def __init__(self, descriptors: tuple[int, int], side: int):
        self.descriptors = descriptors
        memory = mmap.mmap(descriptors[0], 0)
        self._freed = np.frombuffer(memory, np.int64, 1)
        self._bytes = np.frombuffer(memory, np.uint8, offset=_HEADER_BYTES)
        self._side, self._tile_bytes = side, 3 * side * side
        self._written = 0

    @classmethod
    def create(cls, tiles: int, side: int) -> TileRing:
        """A ring that holds `tiles` tiles, at least twice what is reserved at once."""
        memory = os.memfd_create("megablip-tiles")
        os.ftruncate(memory, _HEADER_BYTES + tiles * 3 * side * side)
        return cls((memory, os.eventfd(0)), side)

    def reserve(self, tiles: int) -> tuple[int, np.ndarray]:
        """(position, uint8[tiles, 3, side, side]) to write to; waits until the rank has freed enough.

        What was reserved before counts as written; `commit` may make it smaller.
        """
        size = tiles * self._tile_bytes
        room = len(self._bytes)
        if 2 * size > room:  # else what is lost at the ring's end could leave too little for ever
            raise ValueError(f"{tiles} tiles at once in a ring of {room // self._tile_bytes}")
        place = self._written % room
        start = self._written if place + size <= room else self._written + room - place  # a piece is never parted
        while start + size - int(self._freed[0]) > room:
            os.eventfd_read(self.descriptors[1])
        self._written = start + size
        return start, self.view(start, tiles)

    def commit(self, start: int, tiles: int) -> None:
        """Keep only the first `tiles` of what was reserved last."""
        self._written = start + tiles * self._tile_bytes

    def view(self, start: int, tiles: int) -> np.ndarray:
        """uint8[tiles, 3, side, side] at a position; valid until it is freed."""
        place = start % len(self._bytes)
        return as_tiles(self._bytes[place : place + tiles * self._tile_bytes], self._side)

    def free_to(self, start: int, tiles: int) -> None:
        """Free these tiles and all before them."""
        self._freed[0] = start + tiles * self._tile_bytes
        os.eventfd_write(self.descriptors[1], 1)

    def close(self) -> None:
        """Let go of the memory, which goes once no view is left."""
        del self._freed, self._bytes
        for descriptor in self.descriptors:
            os.close(descriptor)
