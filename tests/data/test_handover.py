import os
import threading
import time

import numpy as np
import pytest

from megablip.data.handover import TileRing

SIDE = 4


@pytest.fixture
def ring():
    made = TileRing.create(6, SIDE)
    yield made
    made.close()


def other_end(ring):
    """The ring as the process sees it that inherits its descriptors."""
    return TileRing(ring.descriptors, SIDE)


def test_what_is_written_is_read_at_the_other_end(ring):
    worker = other_end(ring)
    start, out = worker.reserve(3)
    out[:] = np.arange(3)[:, None, None, None]
    worker.commit(start, 2)  # the third could not be decoded
    second, out = worker.reserve(1)
    out[:] = 9
    assert ring.view(start, 2)[:, 0, 0, 0].tolist() == [0, 1]
    assert ring.view(second, 1).tolist() == np.full((1, 3, SIDE, SIDE), 9).tolist()


def test_sequences_of_any_size_pass_unchanged(ring):
    """The worker is ahead of the rank by what the ring holds, and goes around it many times."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 4, 400).tolist()
    worker, sent = other_end(ring), []

    def work():
        for number, size in enumerate(sizes):
            start, out = worker.reserve(size)
            out[:] = number % 251
            kept = max(0, size - number % 2)
            worker.commit(start, kept)
            sent.append((start, kept))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    for number in range(len(sizes)):
        while len(sent) <= number:
            time.sleep(0)
        start, kept = sent[number]
        assert (ring.view(start, kept) == number % 251).all()
        ring.free_to(start, kept)
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_full_ring_makes_the_worker_wait(ring):
    worker = other_end(ring)
    first, _ = worker.reserve(3)
    worker.reserve(3)
    got = []
    thread = threading.Thread(target=lambda: got.append(worker.reserve(2)), daemon=True)
    thread.start()
    thread.join(timeout=0.2)
    assert thread.is_alive()
    ring.free_to(first, 3)
    thread.join(timeout=10)
    assert got


def test_more_than_half_of_the_ring_at_once_is_refused(ring):
    with pytest.raises(ValueError, match="4 tiles at once in a ring of 6"):
        ring.reserve(4)


def test_closing_gives_back_the_descriptors():
    before = len(os.listdir("/proc/self/fd"))
    ring = TileRing.create(2, SIDE)
    ring.close()
    assert len(os.listdir("/proc/self/fd")) == before
