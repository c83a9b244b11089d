"""Files of torch.save without torch.load: what is read, and what is refused."""

from __future__ import annotations

import collections
import os
import pickle
import zipfile
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megablip.checkpoint.restricted import Stub, TensorRef, TorchFile
from megablip.errors import CheckpointError

MARKER = "executed"


@pytest.fixture(autouse=True)
def nothing_executes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / MARKER).exists()


def archive(path, program: bytes, members: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("a/data.pkl", program)
        for name, data in (members or {}).items():
            file.writestr(f"a/{name}", data)
    return path


class Runs:
    """Its pickle runs what it was made with."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def storage(numel: int = 4, kind: bytes = b"ctorch\nFloatStorage\n", key: bytes = b"0") -> bytes:
    """A persistent id, as a pickle's bytes."""
    parts = [b"(", b"X\x07\x00\x00\x00storage", kind, b"X" + len(key).to_bytes(4, "little") + key]
    return b"".join([*parts, b"X\x03\x00\x00\x00cpu", b"J" + numel.to_bytes(4, "little"), b"tQ"])


def tensor(of: bytes, start: int = 0, shape: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85") -> bytes:
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return b"".join([rebuild, of, b"K" + bytes([start]), shape, stride, b"\x89ccollections\nOrderedDict\n)RtR"])


FLOATS = {"data/0": bytes(16)}

HOSTILE = {
    "os.system": (pickle.dumps(Runs(os.system, f"touch {MARKER}")), {}, "posix.system"),
    "eval": (pickle.dumps({"module": Runs(eval, f"open('{MARKER}','w')")}), {}, "builtins.eval"),
    "getattr": (pickle.dumps(Runs(getattr, [], "append")), {}, "builtins.getattr"),
    "getattr of a class": (
        b"cbuiltins\ngetattr\ncdeepspeed.runtime.zero.config\nZeroStageEnum\n\x8c\x07__bases\x86R.",
        {},
        "builtins.getattr",
    ),
    "getattr of another class": (
        b"cbuiltins\ngetattr\ncdeepspeed.utils.tensor_fragment\nfragment_address\n\x8c\x07weights\x86R.",
        {},
        "builtins.getattr",
    ),
    "old opcode INST": (b"(S'touch executed'\nios\nsystem\n.", {}, "instruction STRING"),
    "opcode OBJ": (b"(cos\nsystem\nX\x01\x00\x00\x00ao.", {}, "os.system"),
    "extension registry": (b"\x82\x01.", {}, "instruction EXT1"),
    "torch's own loader": (b"ctorch\nload\nX\x01\x00\x00\x00a\x85R.", {}, "torch.load"),
    "a class of numpy": (b"cnumpy.core.multiarray\n_reconstruct\n)R.", {}, "numpy.core.multiarray._reconstruct"),
    "a class of DeepSpeed that is not listed": (b"cdeepspeed\ninitialize\n)R.", {}, "deepspeed.initialize"),
    "a dotted name": (b"\x80\x04\x8c\x0bcollections\x8c\x0fabc.sys.modules\x93.", {}, "collections.abc.sys.modules"),
    "a call of what a file made": (b"X\x01\x00\x00\x00a)R.", {}, "calls what is no class"),
    "a call of a storage class": (b"ctorch\nFloatStorage\n)R.", {}, "calls torch.FloatStorage"),
    "attributes of a list": (b"](X\x01\x00\x00\x00aK\x01dub.", {}, "BUILD|instruction DICT"),
    "a list as a key": (b"}]K\x01s.", {}, "a list as a dictionary's key"),
    "a nest of tuples as a key": (b"}" + b")" + b"\x85" * 40 + b"K\x01s.", {}, "tuple as a dictionary's key"),
    "a dictionary made of arguments": (b"ccollections\nOrderedDict\n(]tR.", {}, "unusual way"),
    "no end": (b"]q\x00", {}, "damaged"),
    "an empty stack": (b"a.", {}, "damaged"),
    "an unknown memo": (b"h\x05.", {}, "damaged"),
    "a string longer than the file": (b"X\xff\xff\xff\x7fabc.", {}, "damaged"),
    "no bytes": (b"", {}, "damaged"),
    "a reference to another file": (b"X\x05\x00\x00\x00/etc/Q.", {}, "damaged|outside"),
    "a storage that is not there": (tensor(storage(key=b"9")) + b".", FLOATS, "'9' is not in the file"),
    "a storage outside the archive": (tensor(storage(key=b"../../x")) + b".", FLOATS, "is not in the file"),
    "a storage of another size": (tensor(storage(numel=5)) + b".", FLOATS, "16 bytes instead of 20"),
    "a tensor past its storage": (tensor(storage(), start=1) + b".", FLOATS, "ends outside its storage"),
    "a tensor that repeats an element": (tensor(storage(), stride=b"K\x00\x85") + b".", FLOATS, "not contiguous"),
    "a negative size": (tensor(storage(), shape=b"J\xff\xff\xff\xff\x85") + b".", FLOATS, "shape that is none"),
    "a size that overflows": (tensor(storage(), shape=b"\x8a\x09" + b"\xff" * 8 + b"\x00\x85") + b".", FLOATS, "shape"),
    "a tensor of no storage": (tensor(b"K\x01") + b".", FLOATS, "describes a tensor wrongly"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_with_what_it_asked_for(tmp_path, name):
    program, members, reason = HOSTILE[name]
    path = archive(tmp_path / "hostile.pt", program, members)
    with pytest.raises(CheckpointError, match=reason) as caught:
        TorchFile(path)
    assert caught.value.where == str(path)
    assert caught.value.remedy


def _cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def _flip(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b"weight", b"WEIGHT", 1))


def _big_endian(path):
    archive(path, pickle.dumps({}, 2), {"byteorder": b"big"})


def _twice(path):
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("a/data/0", b"other")


def _moved(path):
    """The directory says that a member lies elsewhere."""
    data = path.read_bytes()
    at = data.rindex(b"PK\x01\x02")
    path.write_bytes(data[: at + 42] + (5).to_bytes(4, "little") + data[at + 46 :])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_cut, "damaged"),
        (_flip, "checksum"),
        (_big_endian, "little-endian"),
        (_twice, "there twice"),
        (_moved, "outside the file"),
        (lambda path: path.write_bytes(b""), "no zip archive"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "no zip archive"),
        (lambda path: path.unlink(), "can't be read"),
        (lambda path: archive(path, pickle.dumps({}), FLOATS, zipfile.ZIP_DEFLATED), "compressed"),
    ],
)
def test_a_damaged_archive_is_refused(tmp_path, damage, reason):
    program = b"}X\x06\x00\x00\x00weight" + tensor(storage()) + b"s."
    path = archive(tmp_path / "damaged.pt", program, FLOATS)
    assert TorchFile(path).content["weight"].shape == (4,)
    damage(path)
    with pytest.raises(CheckpointError, match=reason):
        TorchFile(path)


def test_a_file_of_the_format_before_torch_1_6_is_refused_with_a_remedy(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="load and save it once with torch"):
        TorchFile(tmp_path / "old.pt")


def test_the_instructions_and_the_size_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("megablip.checkpoint.restricted.MAX_INSTRUCTIONS", 1000)
    with pytest.raises(CheckpointError, match="more than 1,000 instructions"):
        TorchFile(archive(tmp_path / "long.pt", b"]" * 2000 + b"."))
    monkeypatch.setattr("megablip.checkpoint.restricted.MAX_PICKLE_BYTES", 100)
    with pytest.raises(CheckpointError, match="more than the 100 that are read"):
        TorchFile(archive(tmp_path / "large.pt", b"]" * 101 + b"."))


@given(st.binary(max_size=200))
def test_no_bytes_end_in_anything_but_an_answer_or_a_refusal(tmp_path_factory, program):
    path = tmp_path_factory.getbasetemp() / "random.pt"
    with suppress(CheckpointError):
        TorchFile(archive(path, program, FLOATS))


@given(st.data())
def test_changed_bytes_of_a_state_dict_do_no_more(tmp_path_factory, data):
    program = bytearray(pickle.dumps({"a": [1, 2.5, None, ("x", True)], "b": {"c": 10**20}}, 2) + tensor(storage()))
    for _ in range(data.draw(st.integers(1, 4))):
        program[data.draw(st.integers(0, len(program) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.pt"
    with suppress(CheckpointError):
        TorchFile(archive(path, bytes(program), FLOATS))


@given(st.binary(max_size=300), st.integers(0, 2**16))
def test_changed_bytes_of_an_archive_do_no_more(tmp_path_factory, garbage, at):
    path = archive(tmp_path_factory.getbasetemp() / "archive.pt", b"]" + b".", FLOATS)
    data = path.read_bytes()
    at %= len(data)
    path.write_bytes(data[:at] + garbage + data[at + len(garbage) :])
    with suppress(CheckpointError):
        TorchFile(path)


NESTED = {
    "float": torch.arange(6, dtype=torch.float32).view(2, 3),
    "part": torch.arange(10, dtype=torch.int64)[3:7],
    "bf16": torch.randn(5).bfloat16(),
    "half": torch.ones(2, 1, 2, dtype=torch.float16),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(7.0),
    "empty": torch.empty(0, 3),
    "one": torch.randn(4, 1)[:, :1],
    "parameter": torch.nn.Parameter(torch.randn(3)),
    "list": [1, -2, 2**40, 1.5, None, True, "text", ("a", (1, 2))],
    "ordered": collections.OrderedDict(a=torch.zeros(1)),
    "size": torch.Size([3, 4]),
    "dtype": torch.bfloat16,
    3: "integer key",
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path, protocol):
    torch.save(NESTED, tmp_path / "state.pt", pickle_protocol=protocol)
    _same(TorchFile(tmp_path / "state.pt").content, NESTED)


def test_tensors_stay_on_disk_and_parts_of_them_can_be_read(tmp_path):
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "state.pt")
    found = TorchFile(tmp_path / "state.pt").content["a"]
    assert found.flat(10, 13).tolist() == [10, 11, 12]
    with pytest.raises(IndexError):
        found.flat(990, 1001)


@pytest.mark.parametrize(
    "program",
    [
        b"cdeepspeed.runtime.zero.config\nZeroStageEnum\nK\x03\x85R.",
        # As Python 3.11.2, Debian's, writes it.
        b"c__builtin__\ngetattr\ncdeepspeed.runtime.zero.config\nZeroStageEnum\n\x8c\x07weights\x86R.",
    ],
)
def test_objects_of_listed_classes_become_stubs(tmp_path, program):
    found = TorchFile(archive(tmp_path / "stub.pt", program)).content
    assert found == Stub("deepspeed.runtime.zero.config.ZeroStageEnum", (3,))


def _same(found, expected):
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, TensorRef)
        assert found.dtype == expected.dtype
        assert torch.equal(found.flat().view(found.shape), expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            _same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _same(one, other)
    else:
        assert found == expected
