"""Slices written at one split are read at any other."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megablip.checkpoint.slices import SliceReader, rank_file, write_slices
from megablip.errors import CheckpointError
from megablip.records import MASTER, MOMENTS, LocalSlice

SHAPES = {"matrix": (5, 7), "bias": (3,), "one": (1,), "conv": (2, 3, 2, 2)}
KINDS = (MASTER, *MOMENTS)


def numbers(name: str, kind: str) -> torch.Tensor:
    count = math.prod(SHAPES[name])
    return torch.arange(count) + 1000.0 * list(SHAPES).index(name) + 0.25 * KINDS.index(kind)


def pieces(name: str, world: int) -> list[tuple[int, int]]:
    """ZeRO's cut: equal pieces, of which the last may be short or empty."""
    count = math.prod(SHAPES[name])
    width = -(-count // world)
    return [(min(rank * width, count), min((rank + 1) * width, count)) for rank in range(world)]


def write_world(folder, world: int, kinds=KINDS) -> None:
    for rank in range(world):
        slices = []
        for name, shape in SHAPES.items():
            start, end = pieces(name, world)[rank]
            tensors = {kind: numbers(name, kind)[start:end].clone() for kind in kinds}
            slices.append(LocalSlice(name, shape, start, end, tensors))
        write_slices(folder / rank_file(rank), slices, {"cpu": torch.tensor([rank], dtype=torch.uint8)})


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folders = {}
    for world in (1, 2, 3, 4):
        folders[world] = tmp_path_factory.mktemp(f"world{world}")
        write_world(folders[world], world)
    return folders


@given(
    world=st.integers(1, 4),
    name=st.sampled_from(list(SHAPES)),
    kind=st.sampled_from(KINDS),
    ends=st.tuples(st.integers(0, 35), st.integers(0, 35)),
)
@settings(deadline=None)
def test_any_stretch_is_read_at_any_world_size(worlds, world, name, kind, ends):
    start, end = sorted(min(number, math.prod(SHAPES[name])) for number in ends)
    read = SliceReader(worlds[world]).read(name, kind, SHAPES[name], start, end)
    assert torch.equal(read, numbers(name, kind)[start:end])
    assert read.dtype == torch.float32


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_whole_tensors_and_random_states(worlds, world):
    reader = SliceReader(worlds[world])
    assert set(reader.parameters) == set(SHAPES)
    for name, shape in SHAPES.items():
        for kind in KINDS:
            assert torch.equal(reader.whole(name, kind), numbers(name, kind).view(shape))
    for rank in range(world):
        assert reader.rng_states(rank)["cpu"].item() == rank
    assert reader.rng_states(world) == {}


def test_a_missing_file_is_noticed(tmp_path):
    write_world(tmp_path, 3)
    (tmp_path / rank_file(1)).unlink()
    reader = SliceReader(tmp_path)
    with pytest.raises(CheckpointError, match="elements 12 to 35 of matrix are in no file") as caught:
        reader.whole("matrix")
    assert "rank's file is missing" in caught.value.remedy
    assert torch.equal(reader.read("matrix", MASTER, (5, 7), 24, 35), numbers("matrix", MASTER)[24:])


def test_another_model_is_refused(worlds):
    reader = SliceReader(worlds[2])
    with pytest.raises(CheckpointError, match=r"matrix \(7, 5\) has shape \(5, 7\) there"):
        reader.read("matrix", MASTER, (7, 5), 0, 35)
    with pytest.raises(CheckpointError, match=r"other \(2,\) is not in the checkpoint"):
        reader.read("other", MASTER, (2,), 0, 2)


def test_moments_that_were_not_saved_are_named(tmp_path):
    write_world(tmp_path, 1, kinds=(MASTER,))
    with pytest.raises(CheckpointError, match="exp_avg"):
        SliceReader(tmp_path).read("bias", "exp_avg", (3,), 0, 3)


def test_files_that_disagree_are_refused(tmp_path):
    write_slices(tmp_path / rank_file(0), [LocalSlice("w", (4,), 0, 2, {MASTER: torch.zeros(2)})], {})
    write_slices(tmp_path / rank_file(1), [LocalSlice("w", (5,), 2, 4, {MASTER: torch.zeros(2)})], {})
    with pytest.raises(CheckpointError, match=r"w has shape \(5,\) here and \(4,\) in another file") as caught:
        SliceReader(tmp_path)
    assert rank_file(1) in caught.value.where


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / rank_file(0)
    for metadata in (None, {"format": "pt"}):
        save_file({"w": torch.zeros(3)}, path, metadata=metadata)
        with pytest.raises(CheckpointError, match="no table of slices"):
            SliceReader(tmp_path)


@pytest.mark.parametrize("table", ["{", "[]", '{"w": 5}', '{"w": {"shape": [3]}}'])
def test_a_table_that_makes_no_sense_is_refused(tmp_path, table):
    save_file({"w": torch.zeros(3)}, tmp_path / rank_file(0), metadata={"megablip.slices": table})
    with pytest.raises(CheckpointError, match="table of slices") as caught:
        SliceReader(tmp_path)
    assert rank_file(0) in caught.value.where


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_cut_file_is_refused(tmp_path, keep):
    write_world(tmp_path, 1)
    path = tmp_path / rank_file(0)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="can't be read") as caught:
        SliceReader(tmp_path)
    assert rank_file(0) in caught.value.where


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=5))
def test_the_masters_lie_at_the_beginning(tmp_path_factory, sizes):
    """Of a file that safetensors itself reads, too; its record tells how far they reach."""
    path = tmp_path_factory.mktemp("file") / rank_file(0)
    slices = [
        LocalSlice(f"w{i}", (n,), 0, n, {kind: torch.arange(n) + float(i) for kind in (KINDS if moments else [MASTER])})
        for i, (n, moments) in enumerate(sizes)
    ]
    told: list[int] = []
    record = write_slices(path, slices, {"cpu": torch.arange(5, dtype=torch.uint8)}, told.append)
    content = path.read_bytes()
    assert record["size"] == sum(told) == len(content)
    assert record["sha256"] == hashlib.sha256(content).hexdigest()
    reach = record["weights"]["bytes"]
    assert record["weights"]["sha256"] == hashlib.sha256(content[:reach]).hexdigest()
    assert reach == 8 + int.from_bytes(content[:8], "little") + 4 * sum(n for n, _ in sizes)
    stored = load_file(path)
    for piece in slices:
        for kind, values in piece.tensors.items():
            assert torch.equal(stored[f"{piece.name}|{kind}"], values)
    reader, cut = SliceReader(path.parent), content[:reach] + bytes(len(content) - reach)
    path.write_bytes(cut)
    assert all(torch.equal(reader.whole(piece.name), piece.tensors[MASTER]) for piece in slices)


def test_a_file_that_can_not_be_written_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        write_slices(tmp_path / "no" / rank_file(0), [], {})
