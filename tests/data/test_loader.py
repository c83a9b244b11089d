import gzip
import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, islice

import numpy as np
import pytest
import torch
from PIL import Image

from megablip.config import parse_config
from megablip.data import samples
from megablip.data.collate import TileMemory
from megablip.data.loader import Loader, micro_batches_per_step, owned_lanes, setup_of
from megablip.data.samples import SampleReader
from megablip.data.shards import HEAD_BYTES
from megablip.errors import CheckpointError, MegablipError, SampleError, ShardError
from megablip.records import DIGESTS, PackedSequence, SampleAddress, VisualLayout
from tests.data.builders import write_tar
from tokenization.train import train_tokenizer

LAYOUT = VisualLayout(tile_size=16, patch_size=8, tokens_per_tile=3, grids=((1, 1), (2, 1), (1, 2)))


def jpeg(number):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (16 + number % 3 * 16, 16 + number % 2 * 16, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def caption(number):
    data = jpeg(number)
    if number % 11 == 5:
        data = b"no image at all"  # fails in the planner, at the header
    elif number % 11 == 7:
        data = data[: len(data) // 2]  # fails in the decode worker, in the pixels
    return {"__key__": b"c%03d" % number, "jpg": data, "txt": b"picture %d" % number}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for shard in range(3):
        write_tar(folder / f"captions/{shard}.tar", [caption(n) for n in range(shard * 40, shard * 40 + 40)])
    texts = [{"__key__": b"t%03d" % n, "txt": b"some words " * (1 + n % 6)} for n in range(60)]
    write_tar(folder / "text/0.tar", texts)
    corpus = folder / "corpus.txt"
    corpus.write_text("some words\npicture 381\n" * 20)
    train_tokenizer([corpus], folder / "tokenizer", vocab_size=300)
    return folder


def config_of(data, run_dir, **changes):
    raw = {
        "stage": "pretrain",
        "run_dir": str(run_dir),
        "duration": "5 steps",
        "model": {"path": "unused"},
        "optimizer": {"lr": 1e-3},
        "data": {
            "sources": [
                {"name": "captions", "shards": f"{data}/captions/{{0..2}}.tar", "schema": "caption", "weight": 2},
                {"name": "text", "shards": f"{data}/text", "schema": "text", "weight": 1},
            ],
            "sequence_length": 64,
            "max_tiles": 4,
            "packing_buffer": 8,
        },
        "batch": {"lanes": 4, "sequences_per_lane": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        raw[section] = {**raw[section], name: value} if name else value
    return parse_config(raw, "test")


def loader_of(data, run_dir, rank=0, world=1, states=None, step=0, **changes):
    config = config_of(data, run_dir, **changes)
    return Loader(config, str(data / "tokenizer"), LAYOUT, rank, world, states, step)


def take(steps, data, run_dir, world=1, states=None, step=0, **changes):
    """The first `steps` batches of each rank."""
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(loader_of(data, run_dir, rank, world, states, step, **changes)) for rank in range(world)
        ]
        return [list(islice(rank, steps)) for rank in ranks]


def drain(loader, limit_s=20):
    """Take batches until it raises."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        next(loader)


def documents(micro_batch):
    """(key, ids, labels, tiles) of each document that is no dummy."""
    found, tile = [], 0
    for number, key in enumerate(micro_batch.keys):
        start, end = micro_batch.cu_seqlens[number : number + 2].tolist()
        inside = (micro_batch.visual_token_index >= start) & (micro_batch.visual_token_index < end)
        tiles = int(inside.sum()) // LAYOUT.tokens_per_tile
        pixels = micro_batch.tiles[tile : tile + tiles].numpy().tobytes()
        tile += tiles
        if int(micro_batch.source[number]) >= 0:
            ids, labels = micro_batch.input_ids[start:end].tolist(), micro_batch.labels[start:end].tolist()
            found.append((key, ids, labels, pixels))
    return found


def global_batches(per_rank, lanes, sequences_per_lane):
    """Of each step: documents of each (index, lane); takes one sequence per micro-batch."""
    world = len(per_rank)
    steps = []
    for batches in zip(*per_rank, strict=True):
        sequences = {}
        for rank, batch in enumerate(batches):
            places = [(index, lane) for index in range(sequences_per_lane) for lane in owned_lanes(lanes, rank, world)]
            assert len(batch.micro_batches) >= len(places)
            for place, micro_batch in zip(places, batch.micro_batches, strict=False):
                sequences[place] = documents(micro_batch)
            assert not any(documents(micro_batch) for micro_batch in batch.micro_batches[len(places) :])
        steps.append([sequences[place] for place in sorted(sequences)])
    return steps


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("reference")
    return take(6, data, run_dir)[0], run_dir


def test_lanes_of_ranks():
    assert [list(owned_lanes(5, rank, 3)) for rank in range(3)] == [[0, 1], [2, 3], [4]]
    for lanes in range(1, 9):
        for world in range(1, lanes + 1):
            expected = [part.tolist() for part in np.array_split(np.arange(lanes), world)]
            assert [list(owned_lanes(lanes, rank, world)) for rank in range(world)] == expected


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (3, 0), (4, 0), (1, 3)])
def test_the_global_batch_does_not_depend_on_ranks_and_workers(data, tmp_path, reference, world, workers):
    expected = global_batches([reference[0]], 4, 2)
    ranks = take(6, data, tmp_path, world, data__decode_workers=workers)
    assert global_batches(ranks, 4, 2) == expected
    states = [{lane: state.tolist() for lane, state in batch.lane_states.items()} for batch in reference[0]]
    for step in range(6):
        merged = {}
        for rank in ranks:
            merged |= {lane: state.tolist() for lane, state in rank[step].lane_states.items()}
        assert merged == states[step]
        assert sum(rank[step].valid_labels for rank in ranks) == reference[0][step].valid_labels
        assert sum(rank[step].tokens for rank in ranks) == reference[0][step].tokens
        assert sum(rank[step].samples_done for rank in ranks) == reference[0][step].samples_done
        drawn = sum(rank[step].samples_drawn for rank in ranks)
        assert drawn.tolist() == reference[0][step].samples_drawn.tolist()
        assert len({len(rank[step].micro_batches) for rank in ranks}) == 1


def test_the_digest_of_a_step_does_not_depend_on_ranks_and_tells_orders_apart(data, tmp_path):
    def digests(world, **changes):
        ranks = take(3, data, tmp_path / "run", world, **changes)
        return [sum(batch.data_digest for batch in batches) % DIGESTS for batches in zip(*ranks, strict=True)]

    expected = digests(1)
    assert len(set(expected)) == 3
    assert digests(3) == expected
    assert digests(1, seed=7) != expected


def test_a_sequence_differs_in_its_digest_by_place_keys_and_tokens():
    sequence = PackedSequence(
        lane=0, index=1, input_ids=np.arange(4, dtype=np.int32), labels=None, doc_lens=None, source=None, pair=None,
        visual_positions=None, tiles=None, patch_mask=None, grids=None, keys=("a", "b"), skipped=(), lane_state=None,
    )  # fmt: skip
    others = [
        replace(sequence, lane=1, index=0),
        replace(sequence, keys=("b", "a")),
        replace(sequence, keys=("a", "\udcff")),  # what a file's name may hold
        replace(sequence, input_ids=np.arange(5, dtype=np.int32)),
    ]
    assert len({one.digest for one in [sequence, *others]}) == 5


def test_micro_batches_hold_the_same_sequences_in_the_same_order(data, tmp_path, reference):
    [larger] = take(2, data, tmp_path, batch={"lanes": 4, "sequences_per_lane": 2, "micro_batch_sequences": 3})
    for batch, expected in zip(larger, reference[0], strict=False):
        assert [len(b.micro_batches) for b in (batch, expected)] == [3, 8]
        a, b = (chain.from_iterable(map(documents, each.micro_batches)) for each in (batch, expected))
        assert list(a) == list(b)


@pytest.mark.parametrize(("step", "world", "workers"), [(1, 1, 2), (5, 2, 1)])
def test_resuming_gives_the_same_batches(data, tmp_path, reference, step, world, workers):
    expected = global_batches([reference[0]], 4, 2)[step:]
    states = reference[0][step - 1].lane_states
    ranks = take(6 - step, data, tmp_path, world, states, step, data__decode_workers=workers)
    assert global_batches(ranks, 4, 2) == expected
    assert [batch.step for batch in ranks[0]] == list(range(step, 6))
    skipped = [{skip for rank in ranks for skip in rank[number].skipped} for number in range(6 - step)]
    assert skipped == [set(batch.skipped) for batch in reference[0][step:]]


def test_resuming_anywhere_at_any_number_of_ranks_and_workers(data, tmp_path):
    """Sources small enough for several epochs, bad samples, and documents that are cut over sequences."""
    books = [{"__key__": b"b%02d" % n, "txt": b"some words " * (3 + n * n)} for n in range(9)]
    write_tar(tmp_path / "books.tar", books)
    sources = config_of(data, tmp_path).model_dump(by_alias=True)["data"]["sources"]
    sources += [
        {"name": "books", "shards": str(tmp_path / "books.tar"), "schema": "text", "weight": 1, "split": "text"}
    ]
    changes = {"data__sources": sources, "data__decode_workers": 0, "data__prefetch_bytes": 0, "batch": {"lanes": 8}}
    steps, rng = 24, np.random.default_rng(0)
    [straight] = take(steps, data, tmp_path, **changes)
    expected = global_batches([straight], 8, 1)
    assert straight[-1].samples_drawn.min() > 2 * 9  # the books are in their third epoch
    for step in rng.choice(np.arange(1, steps), 20, replace=False).tolist():
        world = int(rng.choice([1, 2, 3, 4, 8]))
        workers = int(rng.integers(4)) if world == 1 else 0  # more processes would take long
        own = changes | {"data__decode_workers": workers}
        ranks = take(1, data, tmp_path, world, straight[step - 1].lane_states, step, **own)
        where = f"step {step} on {world} ranks with {workers} workers each"
        assert global_batches(ranks, 8, 1) == expected[step : step + 1], where
        skipped = {skip for rank in ranks for skip in rank[0].skipped}
        assert skipped == set(straight[step].skipped)


def test_bad_samples_are_skipped_and_written_once_delivered(reference):
    batches, run_dir = reference
    lines = [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]
    skips = [(batch.step, skip.key, skip.error) for batch in batches for skip in batch.skipped]
    assert [(line["step"], line["key"], line["error"]) for line in lines] == skips
    numbers = {int(line["key"][1:]) % 11 for line in lines}
    assert numbers == {5, 7}  # at the header, and in the pixels
    for line in lines:
        with open(line["shard"], "rb") as shard:
            shard.seek(line["offset"])
            assert shard.read(3) in (b"no ", b"\xff\xd8\xff")
    used = {key for batch in batches for micro_batch in batch.micro_batches for key in micro_batch.keys}
    assert not any(key.startswith("c") and int(key[1:]) % 11 in (5, 7) for key in used)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_hundred_bad_samples_in_a_row_are_listed_and_the_steps_before_are_given(data, tmp_path, workers):
    """On both ranks; what is listed is not lost with the sequence that never came."""
    rows = [{"__key__": b"b%04d" % n, "jpg": b"no image", "txt": b"words"} for n in range(2000)]
    bad = {"name": "bad", "shards": str(write_tar(tmp_path / "bad.tar", rows)), "schema": "caption"}
    good = {"name": "good", "shards": f"{data}/text", "schema": "text", "weight": [[0, 1], [3, 0]]}
    sources = [good, bad | {"weight": [[0, 0], [3, 1]]}]
    with ExitStack() as stack:
        for rank in range(2):
            loader = stack.enter_context(
                loader_of(data, tmp_path, rank, 2, data__sources=sources, data__decode_workers=workers)
            )
            assert [next(loader).step for _ in range(3)] == [0, 1, 2]
            for _ in range(2):  # they are written once, however often it is asked
                with pytest.raises(SampleError, match="100 samples in a row"):
                    next(loader)
            lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
            assert len({line["key"] for line in lines}) == len(lines) == 100 * (rank + 1)
            assert {(line["step"], line["source"]) for line in lines} == {(3, "bad")}
            assert loader.quarantine.counts == {"bad": 100}


def test_a_failure_lists_what_was_skipped_since_the_last_whole_step(data, tmp_path, reference, monkeypatch):
    calls, plain = [], samples.LanePlanner.next_sequence

    def fail_at_the_seventh(planner):
        calls.append(planner.lane)
        if len(calls) == 7:
            raise ShardError("a disk is gone")
        return plain(planner)

    monkeypatch.setattr(samples.LanePlanner, "next_sequence", fail_at_the_seventh)
    with loader_of(data, tmp_path, data__decode_workers=0) as loader, pytest.raises(ShardError, match="disk is gone"):
        next(loader)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    expected = [(0, skip.key) for skip in reference[0][0].skipped]
    assert 2 < len(lines) <= len(expected)
    assert [(line["step"], line["key"]) for line in lines] == expected[: len(lines)]


def test_an_image_is_measured_by_its_head_or_by_all_of_it(data, tmp_path, monkeypatch):
    """The size of a JPEG in its first bytes, behind a long comment, behind one that ends beyond the head, nowhere."""
    pixels, noise = jpeg(1), np.random.default_rng(0).bytes(60_000)

    def behind(*sizes):
        segments = b"".join(b"\xff\xfe" + struct.pack(">H", 2 + size) + noise[:size] for size in sizes)
        return pixels[:2] + segments + pixels[2:] + noise[:30_000]

    images = [behind(0), behind(500), behind(20_000), behind(HEAD_BYTES - 4), behind(60_000, 60_000)]
    images += [b"\xff\xd8\xff" + bytes(30_000), noise, pixels]
    write_tar(tmp_path / "0.tar", [{"jpg": image, "txt": b"words"} for image in images])
    source = {"name": "c", "shards": str(tmp_path / "0.tar"), "schema": "caption", "weight": 1}
    config = config_of(data, tmp_path, data__sources=[source])
    reader = SampleReader(setup_of(config, str(data / "tokenizer"), LAYOUT, [0], None, 0))

    def measured(number):
        try:
            return reader.measure(SampleAddress(0, 0, number))
        except SampleError as error:
            return str(error)

    found = [measured(number) for number in range(len(images))]
    monkeypatch.setattr(samples, "_is_jpeg", lambda head, size: False)
    assert found == [measured(number) for number in range(len(images))]
    assert [isinstance(cost, tuple) for cost in found] == [True] * 5 + [False] * 2 + [True]


def test_how_much_is_read_ahead_changes_nothing(data, tmp_path, reference, monkeypatch):
    monkeypatch.setattr(samples, "READ_AHEAD_BYTES", 1000)
    [batches] = take(6, data, tmp_path, data__decode_workers=0)
    assert global_batches([batches], 4, 2) == global_batches([reference[0]], 4, 2)
    assert [batch.skipped for batch in batches] == [batch.skipped for batch in reference[0]]


def test_a_document_in_many_pieces_is_encoded_once_for_all_of_them(data, tmp_path, monkeypatch):
    """By the planner and by the decoder; for each piece again where there is no room to hold it."""
    rows = [{"__key__": b"b%d" % n, "txt": b"some words " * 500} for n in range(2)]
    source = {"name": "books", "shards": str(write_tar(tmp_path / "b.tar", rows)), "schema": "text", "weight": 1}
    changes = {"data__sources": [source | {"split": "text"}], "batch": {"lanes": 2}, "duration": "1 epochs"}
    encoded, plain = [], samples.Encoder.encode
    monkeypatch.setattr(
        samples.Encoder, "encode", lambda self, document: encoded.append(document) or plain(self, document)
    )

    def pieces(room):
        encoded.clear()
        monkeypatch.setattr(samples, "HELD_BYTES", room)
        [batches] = take(30, data, tmp_path / "run", data__decode_workers=0, **changes)
        return list(chain.from_iterable(documents(micro) for batch in batches for micro in batch.micro_batches))

    expected = pieces(0)
    assert len(encoded) > len(expected) > 40
    assert pieces(1 << 20) == expected
    assert len(encoded) == 4  # of two samples, cut by the planner and then by the decoder


def test_batches_that_are_held_stay_as_they_are_and_hold_nothing_up(data, tmp_path):
    """More steps than the workers have memory for: tiles are copied then; of those let go the memory is used again."""
    changes = {"data__prefetch_bytes": 0, "batch": {"lanes": 2}}
    with loader_of(data, tmp_path / "a", data__decode_workers=0, **changes) as loader:
        expected = [list(map(documents, batch.micro_batches)) for batch in islice(loader, 40)]
    with loader_of(data, tmp_path / "b", data__decode_workers=2, **changes) as loader:
        held = list(islice(loader, 30))
        slots = [helper.slots for helper in loader._pipeline.helpers if helper.slots]
        addresses = {micro.tiles.data_ptr() for batch in held for micro in batch.micro_batches}
        memory = [range(s._bytes.ctypes.data, s._bytes.ctypes.data + s._bytes.nbytes) for s in slots]
        inside = [address for address in addresses if any(address in part for part in memory)]
        assert 0 < len(inside) < len(addresses)
        assert [list(map(documents, batch.micro_batches)) for batch in held] == expected[:30]
        del held
        assert [list(map(documents, batch.micro_batches)) for batch in islice(loader, 10)] == expected[30:]
        last = next(loader)
    assert all(documents(micro_batch) for micro_batch in last.micro_batches)  # also once the loader is closed


def test_bad_shards(tmp_path, data):
    (tmp_path / "empty").mkdir()
    source = {"name": "s", "shards": str(tmp_path / "empty"), "schema": "text", "weight": 1}
    with pytest.raises(ShardError, match="folder is empty"):
        loader_of(data, tmp_path, data__sources=[source])
    shard = tmp_path / "packed.tar"
    shard.write_bytes(gzip.compress(write_tar(tmp_path / "plain.tar", [{"txt": b"words"}]).read_bytes()))
    with (
        loader_of(data, tmp_path, data__sources=[source | {"shards": str(shard)}]) as loader,
        pytest.raises(ShardError, match="compressed"),
    ):
        next(loader)


def test_damage_of_a_shard_is_told_once_an_epoch_and_what_is_whole_arrives(data, tmp_path):
    shard = write_tar(tmp_path / "cut.tar", [{"txt": b"words %d" % n} for n in range(40)])
    raw = bytearray(shard.read_bytes())
    raw[1024 * 10 : 1024 * 10 + 512] = b"?" * 512  # the header of sample 10
    shard.write_bytes(raw[: 1024 * 30 + 515])  # in the data of sample 30
    source = {"name": "s", "shards": str(shard), "schema": "text", "weight": 1}
    keys, skipped = [], []
    with loader_of(data, tmp_path, data__sources=[source], duration="2 epochs", data__decode_workers=0) as loader:
        while len(keys) < 2 * 29:
            batch = next(loader)
            keys += [key for micro_batch in batch.micro_batches for key in micro_batch.keys if key]
            skipped += batch.skipped
    assert sorted(keys) == sorted([f"{n:06d}" for n in range(30) if n != 10] * 2)
    assert sorted(skip.offset for skip in skipped) == [1024 * 10] * 2 + [1024 * 30] * 2
    assert {skip.shard for skip in skipped} == {str(shard)}
    assert any("the file ends inside a member" in skip.error for skip in skipped)


def test_states_that_do_not_fit(data, tmp_path, reference):
    states = reference[0][1].lane_states
    with pytest.raises(CheckpointError, match="not the end of step 3"):
        loader_of(data, tmp_path, states=states, step=3)
    with pytest.raises(CheckpointError, match="no data state of a lane"):
        loader_of(data, tmp_path, states={lane: states[lane] for lane in (0, 1)}, step=2)
    with pytest.raises(CheckpointError, match="no data state of a lane"):
        loader_of(data, tmp_path, step=2)


def renamed(folder):
    (folder / "0.tar").rename(folder / "9.tar")


def other_keys(folder):
    (folder / "1.idx").unlink(missing_ok=True)
    write_tar(folder / "1.tar", [{"__key__": b"x%03d" % n, "txt": b"some words"} for n in range(30)])


@pytest.mark.parametrize("order", ["samples", "shards"])
@pytest.mark.parametrize(("change", "named_by"), [(renamed, ("samples", "shards")), (other_keys, ("samples",))])
def test_shards_that_were_replaced_are_not_gone_on_with(data, tmp_path, order, change, named_by):
    """With as many samples; of whole shards, which are not counted, only the names are known."""
    for shard in range(3):
        rows = [{"__key__": b"%d-%03d" % (shard, n), "txt": b"some words"} for n in range(30)]
        write_tar(tmp_path / f"a/{shard}.tar", rows)
    source = {"name": "s", "shards": str(tmp_path / "a"), "schema": "text", "weight": 1, "order": order}
    changes = {"data__decode_workers": 0, "batch": {"lanes": 1}}
    [[batch]] = take(1, data, tmp_path / "run", data__sources=[source], **changes)
    go_on = {"states": batch.lane_states, "step": 1, **changes}
    (tmp_path / "a").rename(tmp_path / "b")
    source["shards"] = str(tmp_path / "b")
    assert take(1, data, tmp_path / "run", data__sources=[source], **go_on)[0][0].step == 1
    change(tmp_path / "b")
    if order in named_by:
        with pytest.raises(CheckpointError, match="source s has other shards"):
            take(1, data, tmp_path / "run", data__sources=[source], **go_on)
    else:
        take(1, data, tmp_path / "run", data__sources=[source], **go_on)


@pytest.mark.parametrize("which", ["planner", "worker"])
def test_a_helper_that_is_killed_is_reported(data, tmp_path, which):
    with loader_of(data, tmp_path, data__decode_workers=2) as loader:
        next(loader)
        helper = next(helper for helper in loader._pipeline.helpers if which in helper.name)
        os.kill(helper.process.pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(MegablipError, match=f"{which}.* of rank 0 was killed by SIGKILL"):
            drain(loader)
        assert time.monotonic() - began < 30


def test_an_error_of_a_worker_reaches_the_rank(data, tmp_path):
    shard = write_tar(tmp_path / "s.tar", [{"txt": b"some words %d" % n} for n in range(50)])
    source = {"name": "s", "shards": str(shard), "schema": "text", "weight": 1}
    with loader_of(data, tmp_path, data__sources=[source], data__decode_workers=2) as loader:
        next(loader)
        os.truncate(shard, 2000)
        with pytest.raises(ShardError, match="the shard and its index disagree"):
            drain(loader)


def test_an_unexpected_error_carries_its_traceback(data, tmp_path):
    impossible = VisualLayout(tile_size=16, patch_size=8, tokens_per_tile=3, grids=((0, 1),))
    config = config_of(data, tmp_path)
    with (
        Loader(config, str(data / "tokenizer"), impossible, 0, 1, None) as loader,
        pytest.raises(MegablipError, match=r"(?s)rank 0 failed.*Traceback.*make_tiles"),
    ):
        next(loader)


def test_a_crash_in_c_is_reported_with_the_python_stack(data, tmp_path):
    with loader_of(data, tmp_path) as loader:
        next(loader)
        planner = loader._pipeline.helpers[0]
        os.kill(planner.process.pid, signal.SIGSEGV)
        with pytest.raises(MegablipError, match=r"(?s)planner of rank 0 was killed by SIGSEGV.*workers.py.*_plan"):
            drain(loader)


def test_helpers_ignore_the_signals_of_the_rank(data, tmp_path, reference):
    with loader_of(data, tmp_path) as loader:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # at once: no moment is left open
            for helper in loader._pipeline.helpers:
                os.kill(helper.process.pid, signum)
        batch = next(loader)
    assert global_batches([[batch]], 4, 2) == global_batches([reference[0][:1]], 4, 2)


def test_helpers_end_when_the_rank_is_killed(data, tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from tests.data.test_loader import loader_of
loader = loader_of(Path({str(data)!r}), Path({str(tmp_path)!r}))
next(loader)
print(*(helper.process.pid for helper in loader._pipeline.helpers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = done.stdout.split()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"  # nobody may be there to reap it
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("steps", "expected"), [(0, 1), (0.5, 1), (2.5, 2), (1000, 8)])
def test_prefetch_is_bounded_in_bytes_and_steps_and_never_less_than_one(data, tmp_path, reference, steps, expected):
    batch = reference[0][1]
    images = {"sources": [{"name": "t", "shards": f"{data}/text", "schema": "text", "weight": 1}]}
    config = {f"data__{name}": value for name, value in images.items()}
    loader = loader_of(data, tmp_path, **config)
    size = next(loader).bytes
    loader.close()
    assert size >= batch.tokens * 8
    with loader_of(data, tmp_path, data__prefetch_bytes=int(size * steps), **config) as loader:
        next(loader)
        deadline = time.monotonic() + 20
        while len(loader._ready) < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
        assert len(loader._ready) == expected


def test_pinned_memory_is_asked_for_on_the_gpu_of_the_rank(data, tmp_path, monkeypatch):
    """The thread once began on GPU 0, where each rank then had a context of half a gigabyte."""
    chosen, asked = {}, []

    def empty(self, count, side):
        asked.append(chosen.get(threading.current_thread()))
        return torch.empty(count, 3, side, side, dtype=torch.uint8)

    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", lambda gpu: chosen.update({threading.current_thread(): gpu}))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(TileMemory, "empty", empty)
    config = config_of(data, tmp_path, data__decode_workers=0)
    with Loader(config, str(data / "tokenizer"), LAYOUT, 0, 1, None, pin_memory=True) as loader:
        next(loader)
    assert set(asked) == {3}
    assert threading.main_thread() not in chosen


def test_closing_ends_the_helpers(data, tmp_path):
    loader = loader_of(data, tmp_path)
    next(loader)
    loader.close()
    assert all(helper.process.returncode is not None for helper in loader._pipeline.helpers)
    with pytest.raises(StopIteration):
        next(loader)


def test_counts_of_micro_batches_agree_on_all_ranks(tmp_path):
    config = config_of(tmp_path, tmp_path, batch={"lanes": 5, "sequences_per_lane": 2, "micro_batch_sequences": 3})
    assert [micro_batches_per_step(config, world) for world in (1, 2, 3, 5)] == [4, 2, 2, 1]


def numbered(folder, count, shards):
    """`count` texts that name themselves, in shards of uneven size."""
    ends = np.sort(np.random.default_rng(0).choice(np.arange(1, count), shards - 1, replace=False)).tolist()
    for shard, (start, end) in enumerate(zip([0, *ends], [*ends, count], strict=True)):
        rows = [{"__key__": b"n%05d" % n, "txt": b"words " * (1 + n % 7)} for n in range(start, end)]
        write_tar(folder / f"{shard:03d}.tar", rows)
    return {"name": "numbered", "shards": str(folder), "schema": "text", "weight": 1}


def run_stage(data, run_dir, plan, epochs, **changes):
    """Keys of all trained documents of an epoch-counted stage.

    `plan` gives for each attempt (world, workers, steps it may make); what was
    prefetched beyond them is lost, as when a run is killed.  The last attempt
    goes on until the data is used up.
    """
    changes["duration"] = f"{epochs} epochs"
    states, step, keys = None, 0, []
    for world, workers, steps in plan:
        with ExitStack() as stack:
            ranks = [
                stack.enter_context(
                    loader_of(data, run_dir, rank, world, states, step, data__decode_workers=workers, **changes)
                )
                for rank in range(world)
            ]
            for _ in range(steps) if steps is not None else iter(int, 1):
                batches = [next(rank) for rank in ranks]
                step, states = step + 1, {}
                for batch in batches:
                    states |= batch.lane_states
                    keys += [key for micro in batch.micro_batches for key in micro.keys if key]
                if sum(batch.samples_done for batch in batches) == epochs * sum(ranks[0].samples.values()):
                    return keys
    raise AssertionError("the stage did not end")


@pytest.mark.parametrize(
    "plan",
    [
        [(1, 0, None)],
        [(2, 1, 1), (3, 0, 2), (8, 0, 1), (1, 3, 1), (7, 0, 2), (4, 0, None)],
    ],
)
def test_a_stage_counted_in_epochs_trains_every_sample_once(data, tmp_path, plan):
    source = numbered(tmp_path / "numbered", 1000, 7)
    batch = {"lanes": 8, "sequences_per_lane": 2}
    keys = run_stage(data, tmp_path / "run", plan, 2, data__sources=[source], batch=batch)
    assert sorted(keys) == sorted([f"n{number:05d}" for number in range(1000)] * 2)


@pytest.mark.slow  # two minutes
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_large_stage_counted_in_epochs(data, tmp_path, world, workers):
    source = numbered(tmp_path / "numbered", 10_007, 37)
    batch = {"lanes": 64, "sequences_per_lane": 1, "micro_batch_sequences": 8}
    cuts = np.random.default_rng(world * 10 + workers).integers(1, 4, 5).tolist()
    plan = [*((world, workers, steps) for steps in cuts), (world, workers, None)]
    keys = run_stage(data, tmp_path / "run", plan, 1, data__sources=[source], batch=batch)
    assert sorted(keys) == [f"n{number:05d}" for number in range(10_007)]
