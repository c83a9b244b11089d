import os
import threading
import time

import numpy as np
import pytest

from megablip.data.handover import TileSlots

SIDE = 4


@pytest.fixture
def slots():
    made = TileSlots.create(3, 5, SIDE)
    yield made
    made.close()


def other_end(slots):
    """The slots as the process sees them that inherits their descriptors."""
    return TileSlots(slots.descriptors, slots.slots, SIDE)


def waits(call):
    """A thread that makes the call, which does not return."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(timeout=0.2)
    assert thread.is_alive()
    return thread


def test_what_is_written_is_read_at_the_other_end(slots):
    worker = other_end(slots)
    first, out = worker.take(3)
    out[:] = np.arange(3)[:, None, None, None]
    second, out = worker.take(5)
    out[:] = 9
    assert slots.lend(second, 5).tolist() == np.full((5, 3, SIDE, SIDE), 9).tolist()
    assert slots.lend(first, 2)[:, 0, 0, 0].tolist() == [0, 1]  # the third could not be decoded
    assert worker.take(0)[1].shape == (0, 3, SIDE, SIDE)


def test_a_slot_is_free_once_nobody_holds_its_tiles_in_any_order(slots):
    worker = other_end(slots)
    lent = [slots.lend(worker.take(1)[0], 1) for _ in range(3)]
    taken = []
    thread = waits(lambda: taken.append(worker.take(1)[0]))
    assert slots.lent == 3
    view = lent[1][0, 0]
    del lent[1]
    thread.join(timeout=10)
    assert taken == [1]
    assert slots.lent == 2
    del view  # numpy's views hold the memory, not the slot: tensors made of the array hold the array


def test_the_slot_freed_last_is_taken_first(slots):
    worker = other_end(slots)
    a, b, c = (slots.lend(worker.take(1)[0], 1) for _ in range(3))
    del b, c, a
    assert [worker.take(1)[0] for _ in range(3)] == [0, 2, 1]


def test_sequences_of_any_size_pass_unchanged(slots):
    """The worker is ahead of the rank by what the slots hold, and the rank lets go in no order."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 6, 400).tolist()
    worker, sent, held = other_end(slots), [], []

    def work():
        for number, size in enumerate(sizes):
            slot, out = worker.take(size)
            out[:] = number % 251
            sent.append((slot, max(0, size - number % 2)))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    for number in range(len(sizes)):
        while len(sent) <= number:
            time.sleep(0)
        held.append((number % 251, slots.lend(*sent[number])))
        if len(held) > 2:
            expected, tiles = held.pop(int(rng.integers(3)))
            assert (tiles == expected).all()
            del tiles
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_with_no_slot_free_the_worker_waits(slots):
    worker = other_end(slots)
    numbers = [worker.take(1)[0] for _ in range(3)]
    thread = waits(lambda: worker.take(1))
    slots.lend(numbers[2], 1)
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_closing_gives_back_the_descriptors_and_leaves_what_is_held():
    before = len(os.listdir("/proc/self/fd"))
    slots = TileSlots.create(2, 2, SIDE)
    number, out = other_end(slots).take(1)
    out[:] = 7
    held = slots.lend(number, 1)
    slots.close()
    assert (held == 7).all()
    del held
    del out
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # of the other end, whose memory this test mapped
