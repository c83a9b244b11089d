"""The order of data at the size of a large run: 1024 ranks, 4096 lanes, a billion samples.

Nothing is read: counts of samples are made up.  Coverage is the difference
between the samples that came most and least often after some epochs, of lanes
that draw as many tokens each, of documents with log-normal lengths (sigma 0.5).
"""

from __future__ import annotations

import io
import subprocess
import sys
import time

import numpy as np

from megablip.config import DataConfig
from megablip.data.lanes import LanePlanner, LaneState
from megablip.data.order import Cursor, Mixture, SourceOrder
from tools.bench.core import Row, median_seconds

LANES, RANKS, SOURCES, SHARDS, SAMPLES = 4096, 1024, 11, 100_000, 10**9
WEIGHTS = [1 / (1 + number) for number in range(SOURCES)]
DRAWS = 10**6
COSTS = list(zip(*np.random.default_rng(0).integers([[160], [1]], [[2000], [7]], (2, 1000)).tolist(), strict=True))
COVERED_LANES, STATE_LANES = 512, 512
K_COLUMN = 3  # of a state's row for a source: which of the lane's blocks it is at


def rows() -> list[Row]:
    orders = orders_of(LANES)
    cursors = cursors_of(orders)
    address_us, error = draw(cursors[0])
    largest = orders[0]
    far = SAMPLES // LANES // largest.block_size  # blocks of a lane until the source has given a billion samples
    seconds = median_seconds(
        {"start": lambda: begin_at(orders, 0), "far": lambda: begin_at(orders, far)},
        repeats=15,
    )
    state_mb, resume_s = state_and_resume()
    return [
        Row("memory", resident_mib(), "MiB of a process", "lower", goal=200),
        Row("address", address_us, "us", "lower", goal=20),
        Row("mixture_error", error, "", "lower", goal=1e-3),
        Row("first_sequence_far", seconds["far"] / seconds["start"], "x of a start", "lower", goal=2),
        Row("state", state_mb, "MB as npz", "lower", goal=5),
        Row("resume", resume_s, "s", "lower", goal=5),
        *coverage(3000, (1, 2, 5), seeds=10),
        *coverage(10_000, (1, 2, 5), seeds=3),
        *coverage(665_000, (1, 2, 5), seeds=1),
    ]


def orders_of(lanes: int) -> list[SourceOrder]:
    """One source with nearly all samples and shards, and ten of 10,000 to 5 million."""
    sizes = [SAMPLES, *np.geomspace(10_000, 5_000_000, SOURCES - 1).astype(int).tolist()]
    orders = []
    for number, size in enumerate(sizes):
        shards = max(1, SHARDS * size // SAMPLES)
        orders.append(SourceOrder(f"source {number}", np.full(shards, size // shards), lanes, seed=0))
    return orders


def cursors_of(orders: list[SourceOrder]) -> list[list[Cursor]]:
    """Of a rank's lanes, each of which has drawn from each source."""
    cursors = [[Cursor(order, lane) for order in orders] for lane in range(LANES // RANKS)]
    for lane in cursors:
        for cursor in lane:
            cursor.next()
    return cursors


def resident_mib() -> float:
    """What a process that does nothing else has held of memory at most, Python and numpy included."""
    program = (
        "from tools.bench.order import LANES, cursors_of, orders_of\n"
        "cursors_of(orders_of(LANES))\n"
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout) / 2**10


def draw(cursors: list[Cursor]) -> tuple[float, float]:
    """Microseconds for an address, mixture included; the largest error of a share after DRAWS draws."""
    mixture = Mixture([f"source {number}" for number in range(SOURCES)], "tokens", 4096, lane=0, seed=0)
    mixture.begin(WEIGHTS)
    lengths = np.random.default_rng(0).lognormal(6, 0.8, DRAWS).astype(int).tolist()
    began = time.perf_counter()
    for length in lengths:
        source = mixture.pick()
        cursors[source].next()
        mixture.consume(source, length)
    seconds = time.perf_counter() - began
    shares = np.array(mixture.consumed) / sum(mixture.consumed)
    return seconds / DRAWS * 1e6, float(np.abs(shares - np.array(WEIGHTS) / sum(WEIGHTS)).max())


def begin_at(orders: list[SourceOrder], k: int) -> None:
    """Plan the first sequence of some lanes that resume where the first source is at its k-th block of the lane."""
    for lane in range(10):
        state = planner(orders, lane, None).state.copy()
        LaneState(state).sources[0, K_COLUMN] = k
        planner(orders, lane, state).next_sequence()


def planner(orders: list[SourceOrder], lane: int, state: np.ndarray | None) -> LanePlanner:
    """Of documents with 160 to 2000 tokens and 1 to 7 tiles."""
    names = [{"name": f"source {n}", "shards": "x", "schema": "text", "weight": w} for n, w in enumerate(WEIGHTS)]
    data = DataConfig(sources=names, sequence_length=4096, max_tiles=32)
    return LanePlanner(lane, data, 0, 1, orders, lambda address: COSTS[address.sample % 1000], state=state)


def state_and_resume() -> tuple[float, float]:
    """Megabytes of a checkpoint's lane states, and seconds until all lanes have planned on from it."""
    orders = orders_of(STATE_LANES)
    states = {str(lane): planner(orders, lane, None).next_sequence().lane_state for lane in range(STATE_LANES)}
    file = io.BytesIO()
    np.savez_compressed(file, **states)
    began = time.perf_counter()
    for lane, state in states.items():
        planner(orders, int(lane), state).next_sequence()
    return file.tell() / 1e6, time.perf_counter() - began


def coverage(total: int, epochs: tuple[int, ...], seeds: int) -> list[Row]:
    """The median spread of some seeds; that of 3,000 samples is 4 for one seed in ten after 5 epochs."""
    spreads = [spread(total, epochs, seed) for seed in range(seeds)]
    return [
        Row(f"spread_{total}_x{number}", float(np.median(column)), "", "lower", goal=3 if number == 5 else 2)
        for number, column in zip(epochs, zip(*spreads, strict=True), strict=True)
    ]


def spread(total: int, epochs: tuple[int, ...], seed: int) -> list[int]:
    order = SourceOrder("small", np.array([total]), COVERED_LANES, seed)
    lengths = np.random.default_rng(seed).lognormal(0, 0.5, total)
    counts = np.zeros((len(epochs), total), int)
    tokens = np.array(epochs) * lengths.sum() / COVERED_LANES  # that each lane has drawn
    for lane in range(COVERED_LANES):
        drawn, k = [], 0
        passed = 0.0
        while passed < tokens[-1]:
            _, start, length = order.block(lane, k)
            drawn += range(start, start + length)
            passed += lengths[start : start + length].sum()
            k += 1
        before = np.cumsum(lengths[drawn]) - lengths[drawn]
        for row, budget in zip(counts, tokens, strict=True):
            np.add.at(row, np.array(drawn)[before < budget], 1)
    return (counts.max(axis=1) - counts.min(axis=1)).tolist()
