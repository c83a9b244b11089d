"""Safetensors files, as others may write them."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

from megablip.checkpoint.tensors import DTYPES, TensorFile
from megablip.errors import CheckpointError

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path, header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=5).filter(str.isprintable), st.lists(st.integers(0, 4), max_size=3)
    ),
    dtype=st.sampled_from(list(DTYPES.values())),
    odd=st.booleans(),
)
@settings(max_examples=60)
def test_what_safetensors_writes_is_read(tmp_path_factory, shapes, dtype, odd):
    values = {name: torch.randint(0, 2, shape).to(dtype) for name, shape in shapes.items()}
    if odd:  # not aligned
        values["\0"] = torch.ones(3, dtype=torch.uint8)
    path = tmp_path_factory.mktemp("f") / "f"
    save_file(values, path, metadata={"a": "b"})
    file = TensorFile(path)
    assert file.metadata == {"a": "b"}
    assert set(file.shapes) == set(values)
    for name, value in values.items():
        assert file.dtypes[name] == value.dtype
        assert torch.equal(file.tensor(name), value)


def test_stretches_are_read_in_place_and_bounded(tmp_path):
    save_file({"x": torch.arange(12.0).view(3, 4)}, tmp_path / "f")
    file = TensorFile(tmp_path / "f")
    assert file.elements("x", 3, 7).tolist() == [3, 4, 5, 6]
    assert file.elements("x", 12, 12).numel() == 0
    for start, end in ((0, 13), (-1, 3), (5, 4)):
        with pytest.raises(CheckpointError, match=f"12 elements of it, not {start} to {end}"):
            file.elements("x", start, end)
    with pytest.raises(CheckpointError, match="no such tensor"):
        file.elements("y", 0, 1)


def test_a_file_that_is_read_is_never_changed(tmp_path):
    save_file({"x": torch.zeros(4)}, tmp_path / "f")
    TensorFile(tmp_path / "f").tensor("x").add_(1)
    assert TensorFile(tmp_path / "f").tensor("x").sum() == 0


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[]", "no JSON object"),
        (b"[" * 100_000, "no JSON"),
        (b'{"x": ' * 50_000 + b"1" + b"}" * 50_000, "no JSON"),
        (b'{"x": NaN}', "NaN is no JSON"),
        (b'{"x": %s, "x": %s}' % ((json.dumps(ENTRY).encode(),) * 2), "listed twice"),
        (b'{"x": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "listed twice"),
        ({"x": 5}, "x has not just dtype"),
        ({"x": ENTRY | {"code": "import os"}}, "x has not just dtype"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "x has not just dtype"),
        ({"x": ENTRY | {"dtype": "F33"}}, "dtype 'F33'"),
        ({"x": ENTRY | {"dtype": ["F32"]}}, "dtype"),
        ({"x": ENTRY | {"dtype": "F64"}}, "x has 8 bytes, its shape"),
        ({"x": ENTRY | {"shape": [3]}}, "x has 8 bytes, its shape"),
        ({"x": ENTRY | {"shape": [2.0]}}, "not whole numbers"),
        ({"x": ENTRY | {"shape": [True, 2]}}, "not whole numbers"),
        ({"x": ENTRY | {"shape": [-1, -2]}}, "not whole numbers"),
        ({"x": ENTRY | {"shape": 2}}, "not whole numbers"),
        ({"x": ENTRY | {"shape": [2**32, 2**32], "data_offsets": [0, 2**66]}}, "not whole numbers"),
        ({"x": ENTRY | {"data_offsets": [0, 8, 16]}}, "not whole numbers"),
        ({"x": ENTRY | {"data_offsets": [8, 0]}}, "another number"),
        ({"x": ENTRY | {"data_offsets": [8, 16]}}, "x does not begin where"),
        ({"x": ENTRY, "y": ENTRY}, "does not begin where"),
        ({"x": ENTRY, "y": ENTRY | {"data_offsets": [12, 20]}}, "y does not begin where"),
        ({"x": ENTRY, "y": ENTRY | {"data_offsets": [8, 16]}}, "end at byte"),
        ({}, "end at byte"),
        ({"__metadata__": {"a": 5}, "x": ENTRY}, "metadata"),
        ({"__metadata__": "a", "x": ENTRY}, "metadata"),
    ],
)
def test_a_header_that_breaks_the_rules_is_refused(tmp_path, header, words):
    path = write(tmp_path / "f", header)
    with pytest.raises(CheckpointError, match=words) as caught:
        TensorFile(path)
    assert "can't be read" in str(caught.value)
    assert str(path) in caught.value.where


@pytest.mark.parametrize("length", [9 + 8, 100_000_001, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_or_any_sense_is_refused(tmp_path, length):
    path = write(tmp_path / "f", b"{}", length=length)
    with pytest.raises(CheckpointError, match=f"its header would have {length}"):
        TensorFile(path)


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    for path in (tmp_path, tmp_path / "no", tmp_path / "empty"):
        with pytest.raises(CheckpointError, match="can't be read"):
            TensorFile(path)


GOOD = save({"x": torch.arange(4.0), "y": torch.ones(2, 3, dtype=torch.bfloat16)}, metadata={"format": "pt"})


@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 9)
)
@example([(0, 0)], 0)
@settings(max_examples=300)
def test_any_damage_is_refused_or_harmless(tmp_path_factory, changes, cut):
    """What is read at all is what safetensors itself reads; nothing else is ever raised."""
    content = bytearray(GOOD)
    for place, value in changes:
        content[place] = value
    content = bytes(content[: len(content) - cut])
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        file = TensorFile(path)
    except CheckpointError:
        return
    expected = load(content)
    assert set(file.shapes) == set(expected)
    for name, value in expected.items():
        assert torch.equal(file.tensor(name).view(torch.uint8), value.view(torch.uint8))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
@settings(max_examples=200)
def test_any_json_is_refused_with_a_reason(tmp_path_factory, value):
    path = write(tmp_path_factory.getbasetemp() / "any", {"x": value})
    with pytest.raises(CheckpointError, match="can't be read: "):
        TensorFile(path)
