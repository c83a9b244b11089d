"""Safetensors files written piece by piece, and folders that appear whole."""

from __future__ import annotations

import errno
import json
import math
import os
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megablip.checkpoint import writer as writer_module
from megablip.checkpoint.writer import ShardWriter, new_folder
from megablip.errors import CheckpointError, ConfigError

SHAPES = {"b": (3, 5), "a": (7,), "scalar": (), "empty": (0, 4), "c": (2, 3, 4)}


def tensors(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def pieces(values, seed, cuts=3):
    """The tensors cut anywhere, in any order."""
    rng = random.Random(seed)
    found = []
    for name, value in values.items():
        ends = sorted({0, value.numel(), *(rng.randint(0, value.numel()) for _ in range(cuts))})
        found += [(name, low, value.flatten()[low:high]) for low, high in pairwise(ends)]
    rng.shuffle(found)
    return found


def write(folder, values, dtype=torch.float32, seed=0, **options):
    with ShardWriter(folder, {name: tuple(value.shape) for name, value in values.items()}, dtype, **options) as writer:
        for piece in pieces(values, seed):
            writer.write(*piece)
    return folder


def read(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shard_bytes=st.sampled_from([1, 40, 10**9]),
    chunk=st.sampled_from([1, 3, 1 << 20]),
)
@settings(max_examples=40)
def test_pieces_in_any_order_make_what_torch_would_write(tmp_path_factory, seed, dtype, shard_bytes, chunk):
    values = tensors(seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "CHUNK", chunk)
        written = read(write(tmp_path_factory.mktemp("out"), values, dtype, seed, shard_bytes=shard_bytes))
    assert set(written) == set(values)
    for name, value in values.items():
        assert torch.equal(written[name], value.to(dtype)), name


def test_casts_are_torchs_for_every_bfloat16_and_for_halfway_values(tmp_path):
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    bits = torch.cat([upper << 16, (upper << 16) | 0x8000, (upper << 16) | 0x7FFF])
    values = {"x": bits.view(torch.float32)}
    written = read(write(tmp_path, values, torch.bfloat16))["x"]
    assert torch.equal(written.view(torch.int16), values["x"].to(torch.bfloat16).view(torch.int16))


def test_dtypes_may_differ_by_name_and_arrays_may_be_numpys(tmp_path):
    shapes, dtypes = {"x": (3,), "y": (2,), "z": (5,)}, {"x": torch.bfloat16, "y": torch.float32, "z": torch.uint8}
    with ShardWriter(tmp_path, shapes, dtypes) as writer:
        writer.write("x", 0, np.array([1, 2, 3], np.float32))
        writer.write("z", 0, torch.arange(5, dtype=torch.uint8))
        writer.write("y", 0, np.array([1.5, 2.5], np.float64))
    written = load_file(tmp_path / "model.safetensors")
    assert {name: value.dtype for name, value in written.items()} == dtypes
    assert written["y"].tolist() == [1.5, 2.5]


def test_the_index_lists_every_file(tmp_path):
    values = tensors({str(n): (10,) for n in range(7)})
    write(tmp_path, values, shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 40
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], values[name])


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([(0, 4), (5, 10)], "x: elements 4 to 5 were never written"),
        ([(0, 9)], "x: elements 9 to 10 were never written"),
        ([], "x: elements 0 to 10 were never written"),
        ([(5, 10), (0, 6)], "x: elements 5 to 6 were written twice"),
        ([(0, 10), (0, 10)], "x: elements 0 to 10 were written twice"),
        ([(0, 11)], "elements 0 to 11 were given for x, which has 10"),
        ([(-1, 3)], "elements -1 to 3 were given for x"),
    ],
)
def test_elements_must_be_written_once(tmp_path, spans, words):
    def convert():
        with new_folder(tmp_path / "out") as folder, ShardWriter(folder, {"x": (2, 5)}, torch.float32) as writer:
            for start, end in spans:
                writer.write("x", start, torch.zeros(end - start))

    with pytest.raises(CheckpointError, match=words):
        convert()
    assert not list(tmp_path.iterdir())


def test_an_unknown_tensor_is_named(tmp_path):
    with (
        pytest.raises(CheckpointError, match="there is no tensor y"),
        ShardWriter(tmp_path, {"x": (1,)}, torch.float32) as writer,
    ):
        writer.write("y", 0, torch.zeros(1))


def test_values_that_fp16_turns_to_infinity_are_refused(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"x has values that fp16 can't hold, up to 7e\+04"),
        ShardWriter(tmp_path, {"x": (3,)}, torch.float16) as writer,
    ):
        writer.write("x", 0, torch.tensor([1.0, 7e4, float("inf")]))


def test_weights_that_do_not_fit_the_disk_are_refused_at_once(tmp_path):
    with pytest.raises(CheckpointError, match=r"bytes and [\d,]+ are free"):
        ShardWriter(tmp_path, {"x": (10**15,)}, torch.float32)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(small_disk):
    count = 2 * 10**5  # 0.8 of the disk's MiB; then something else takes the rest

    def convert():
        with new_folder(small_disk / "out") as folder, ShardWriter(folder, {"x": (count,)}, torch.float32) as writer:
            (small_disk / "other").write_bytes(b"x" * 5 * 10**5)
            writer.write("x", 0, torch.zeros(count))

    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        convert()
    assert "free space" in caught.value.remedy
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_an_output_that_exists_is_left_alone(tmp_path):
    with pytest.raises(ConfigError, match="exists already"), new_folder(tmp_path):
        pass


def test_the_folder_appears_when_all_is_on_disk_and_what_a_killed_attempt_left_does_not_hinder(tmp_path, monkeypatch):
    output, synced, real = tmp_path / "out", set(), os.fsync

    def sync(descriptor):
        assert not output.exists() or os.path.samefile(f"/proc/self/fd/{descriptor}", tmp_path)
        synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "model-00001-of-00002.safetensors").write_bytes(b"half")
    with new_folder(output) as folder:
        (folder / "config.json").write_text("{}")
        write(folder, tensors())
        assert not output.exists()
    assert {path.name for path in output.iterdir()} == {"config.json", "model.safetensors"}
    assert {"config.json", "model.safetensors", "out.tmp", tmp_path.name} <= synced
    assert not (tmp_path / "out.tmp").exists()


def test_a_failed_sync_is_an_error(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(writer_module, "_SYNC_BYTES", 1)
    monkeypatch.setattr(os, "fdatasync", fail)
    values = tensors()
    with pytest.raises(CheckpointError, match="Input/output error"), new_folder(tmp_path / "out") as folder:
        write(folder, values)
    assert not list(tmp_path.iterdir())


def test_total_bytes(tmp_path):
    with pytest.raises(CheckpointError), ShardWriter(tmp_path, SHAPES, torch.bfloat16) as writer:
        assert writer.total_bytes == 2 * sum(math.prod(shape) for shape in SHAPES.values())
