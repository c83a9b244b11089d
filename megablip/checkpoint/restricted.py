"""Files of `torch.save`, read without running anything that they say.

A pickle is a program. This module interprets the few instructions that a state
dict needs itself: the only callables it knows are those below, all written here,
and a class that is not listed is refused by its name. Nothing is imported, and
tensors stay on disk: each becomes a `TensorRef`, where its elements lie in the
file. Sizes are bounded, keys are plain values, and extents are checked, so that
a hostile file costs neither memory nor time.

Format: torch/serialization.py (a zip archive of uncompressed members: data.pkl
and data/KEY for each storage), and pickletools of the standard library.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megablip.errors import CheckpointError

MAX_PICKLE_BYTES = 32 * 2**20  # 100,000 tensors take about 20 MB
MAX_INSTRUCTIONS = 5_000_000
MAX_DIMENSIONS = 32

DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
"""Of storages, by the names of torch's classes: FloatStorage and so on."""

_NAMED_DTYPES = {f"torch.{name}": getattr(torch, name) for name in (
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
)}  # fmt: skip
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class Stub:
    """Stands for an object of a class that is known but not needed: its name, arguments and attributes."""

    class_name: str
    arguments: tuple[Any, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorRef:
    """A contiguous tensor in a file.

    Attributes:
        offset: bytes, of the first element, from the file's start.
    """

    file: TorchFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def flat(self, start: int = 0, end: int | None = None) -> torch.Tensor:
        """The elements [start, end), mapped from the file: read when they are touched, and not to be written."""
        end = self.numel if end is None else end
        if not 0 <= start <= end <= self.numel:
            raise IndexError(f"elements {start} to {end} of {self.numel}")
        return self.file.mapped(self.dtype, self.offset + start * self.dtype.itemsize, end - start)


class TorchFile:
    """One file of `torch.save`.

    Attributes:
        content: what was saved, with TensorRefs for tensors and Stubs for objects.

    Raises:
        CheckpointError: the file can't be read, is no such file, is damaged, or
            asks for a class that is not listed.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._size = path.stat().st_size
            with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
                self._members = self._checked(archive)
                program = self._read_program(stream)
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise self._error(*self._diagnosis(error)) from None
        self.content = _Machine(self).run(program)

    @cached_property
    def _memory(self) -> mmap.mmap:
        with self.path.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def mapped(self, dtype: torch.dtype, offset: int, numel: int) -> torch.Tensor:
        """A vector of the file's bytes from `offset` on."""
        if not numel:
            return torch.empty(0, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it can't be written
            return torch.frombuffer(self._memory, dtype=dtype, count=numel, offset=offset)

    def storage(self, key: str) -> tuple[int, int]:
        """Offset and size in bytes of a storage's data."""
        member = self._members.get(f"{self._root}data/{key}")
        if member is None:
            raise self._error(f"storage {key!r} is not in the file", "copy the file again")
        return member

    def _checked(self, archive: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
        """Offset and size of each member's data."""
        programs = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError(f"{len(programs)} members are called data.pkl")
        self._root = programs[0].removesuffix("data.pkl")
        members: dict[str, tuple[int, int]] = {}
        for info in archive.infolist():
            if info.filename in members:
                raise ValueError(f"member {info.filename} is there twice")
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
                raise ValueError(f"member {info.filename} is compressed or encrypted")
            archive.fp.seek(info.header_offset)
            magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(archive.fp.read(_LOCAL_HEADER.size))
            start = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
            if magic != b"PK\x03\x04" or start + info.file_size > self._size:
                raise ValueError(f"member {info.filename} lies outside the file")
            members[info.filename] = (start, info.file_size)
        self._crc = archive.getinfo(programs[0]).CRC
        order = members.get(f"{self._root}byteorder")
        if order:
            archive.fp.seek(order[0])
            if archive.fp.read(min(order[1], 16)) != b"little":
                raise ValueError("the numbers are not little-endian")
        return members

    def _read_program(self, stream: Any) -> bytes:
        start, size = self._members[f"{self._root}data.pkl"]
        if size > MAX_PICKLE_BYTES:
            raise ValueError(f"its pickle has {size:,} bytes, more than the {MAX_PICKLE_BYTES:,} that are read")
        stream.seek(start)
        program = stream.read(size)
        if zlib.crc32(program) != self._crc:
            raise ValueError("the checksum of its pickle is wrong")
        return program

    def _diagnosis(self, error: Exception) -> tuple[str, str]:
        if isinstance(error, OSError):
            return f"the file can't be read: {error.strerror}", "check the path"
        with self.path.open("rb") as stream:
            start = stream.read(4)
        if start != b"PK\x03\x04":
            return (
                "the file is no zip archive, as torch.save writes since version 1.6",
                "if it is an older one and you trust it, load and save it once with torch",
            )
        return f"the file is damaged: {error}", "copy it again; it may be cut short"

    def _error(self, what: str, remedy: str) -> CheckpointError:
        return CheckpointError(what, where=str(self.path), remedy=remedy)


@dataclass(frozen=True)
class _Global:
    """A name that the pickle asked for, and that is listed."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    offset: int
    numel: int


class _Mark:
    pass


class _Refused(Exception):
    """Becomes a CheckpointError that names the file."""


class _Machine:
    """Interprets one pickle."""

    def __init__(self, file: TorchFile):
        self._file = file
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        try:
            for count, (instruction, argument, _) in enumerate(pickletools.genops(program)):
                if count > MAX_INSTRUCTIONS:
                    raise _Refused(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions")
                name = instruction.name
                if name == "STOP":
                    (result,) = self._stack
                    return result
                if name in _CONSTANTS:
                    self._stack.append(_CONSTANTS[name])
                elif name in _LITERALS:
                    self._stack.append(argument)
                elif name in _MUTABLE:
                    self._stack.append(_MUTABLE[name]())
                elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                    self._memo[argument] = self._stack[-1]
                elif name in ("BINGET", "LONG_BINGET", "GET"):
                    self._stack.append(self._memo[argument])
                elif name not in ("PROTO", "FRAME"):
                    step = getattr(self, f"_{name.lower()}", None)
                    if step is None:
                        raise _Refused(f"its pickle has the instruction {name}, which no state dict needs")
                    step(argument)
        except _Refused as error:
            what, remedy = str(error), "only what torch and DeepSpeed save is read; such a file may be an attack"
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, struct.error) as error:
            what, remedy = f"its pickle is damaged: {type(error).__name__}: {error}"[:500], "copy the file again"
        raise CheckpointError(f"the file is refused: {what}", where=str(self._file.path), remedy=remedy) from None

    def _mark(self, argument: Any) -> None:
        self._stack.append(_Mark)

    def _memoize(self, argument: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _pop(self, argument: Any) -> None:
        self._stack.pop()

    def _global(self, argument: str) -> None:
        self._look_up(argument.replace(" ", ".", 1))

    def _stack_global(self, argument: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _Refused("its pickle asks for a class without a name")
        self._look_up(f"{module}.{name}")

    def _look_up(self, name: str) -> None:
        if name in _NAMED_DTYPES:
            self._stack.append(_NAMED_DTYPES[name])
        elif name in _CALLABLES or name in STUBS or name in _STORAGES or name in _TYPES:
            self._stack.append(_Global(name))
        else:
            raise _Refused(f"its pickle asks for {name[:200]}, which is not among the classes that are read")

    def _tuple(self, argument: Any) -> None:
        self._stack.append(tuple(self._after_mark()))

    def _tuple1(self, argument: Any) -> None:
        self._stack[-1:] = [(self._stack[-1],)]

    def _tuple2(self, argument: Any) -> None:
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def _tuple3(self, argument: Any) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _append(self, argument: Any) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, argument: Any) -> None:
        self._extend(self._after_mark())

    def _extend(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise TypeError("values are appended to what is no list")
        self._stack[-1].extend(values)

    def _setitem(self, argument: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _setitems(self, argument: Any) -> None:
        self._set(self._after_mark())

    def _set(self, flat: list[Any]) -> None:
        if type(self._stack[-1]) is not dict or len(flat) % 2:
            raise TypeError("values are set in what is no dictionary")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            # Hashing a nest of tuples can take for ever.
            plain = len(key) <= MAX_DIMENSIONS and all(map(_is_plain, key)) if type(key) is tuple else _is_plain(key)
            if not plain:
                raise _Refused(f"its pickle has a {type(key).__name__} as a dictionary's key")
            self._stack[-1][key] = value

    def _reduce(self, argument: Any) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(called, arguments))

    def _newobj(self, argument: Any) -> None:
        self._reduce(argument)

    def _build(self, argument: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Stub) and type(state) is dict:
            target.attributes.update(state)
        elif not isinstance(target, dict | TensorRef):  # attributes of those are not needed
            raise _Refused(f"its pickle sets attributes of a {type(target).__name__}")

    def _binpersid(self, argument: Any) -> None:
        kind, storage, key, _, numel = self._stack.pop()
        if kind != "storage" or not isinstance(storage, _Global) or storage.name not in _STORAGES:
            raise _Refused("its pickle refers to something outside that is no storage")
        dtype = _STORAGES[storage.name]
        if not isinstance(key, str) or not _is_count(numel):
            raise _Refused("its pickle describes a storage wrongly")
        offset, size = self._file.storage(key)
        if size != numel * dtype.itemsize:
            raise _Refused(f"storage {key!r} has {size:,} bytes instead of {numel * dtype.itemsize:,}")
        self._stack.append(_Storage(dtype, offset, numel))

    def _call(self, called: Any, arguments: Any) -> Any:
        if not isinstance(called, _Global) or type(arguments) is not tuple:
            raise _Refused("its pickle calls what is no class")
        if called.name in STUBS:
            return Stub(called.name, arguments)
        if called.name not in _CALLABLES:
            raise _Refused(f"its pickle calls {called.name}")
        return _CALLABLES[called.name](self, *arguments)

    def _after_mark(self) -> list[Any]:
        for position in range(len(self._stack) - 1, -1, -1):
            if self._stack[position] is _Mark:
                values = self._stack[position + 1 :]
                del self._stack[position:]
                return values
        raise IndexError("a mark is missing")

    def _ordered_dict(self, *arguments: Any) -> dict[Any, Any]:
        if arguments:
            raise _Refused("its pickle makes a dictionary in an unusual way")
        return {}

    def _size(self, dimensions: Any) -> tuple[int, ...]:
        return _extent(dimensions)

    def _tensor(self, storage: Any, start: Any, shape: Any, stride: Any, *_: Any) -> TensorRef:
        shape, stride = _extent(shape), _extent(stride)
        if not isinstance(storage, _Storage) or not _is_count(start) or len(shape) != len(stride):
            raise _Refused("its pickle describes a tensor wrongly")
        expected = 1
        for size, step in zip(reversed(shape), reversed(stride), strict=True):
            if size > 1 and step != expected and 0 not in shape:
                raise _Refused("its pickle has a tensor that is not contiguous")
            expected *= size
        if start + math.prod(shape) > storage.numel:
            raise _Refused(f"its pickle has a tensor that ends outside its storage of {storage.numel:,} elements")
        return TensorRef(self._file, storage.dtype, shape, storage.offset + start * storage.dtype.itemsize)

    def _parameter(self, tensor: Any, *_: Any) -> TensorRef:
        if not isinstance(tensor, TensorRef):
            raise _Refused("its pickle makes a parameter of something else")
        return tensor

    def _with_attributes(self, rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
        if not isinstance(kind, _Global) or kind.name not in _TYPES or rebuild == _Global(_FROM_TYPE):
            raise _Refused("its pickle makes a tensor of an unusual type")
        return self._call(rebuild, arguments)

    def _zero_stage(self, kind: Any, name: Any) -> Stub:
        """Python 3.11.2 writes a member of an enumeration as `getattr(class, name)`, 3.11.7 as `class(value)`."""
        if kind != _Global(_ZERO_STAGE) or not isinstance(name, str) or name not in _ZERO_STAGES:
            raise _Refused("its pickle calls builtins.getattr for something else than a stage of ZeRO")
        return Stub(_ZERO_STAGE, (_ZERO_STAGES.index(name),))

    def _device(self, *arguments: Any) -> Stub:
        return Stub("torch.device", arguments)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bytes | None)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _extent(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > MAX_DIMENSIONS or not all(map(_is_count, value)):
        raise _Refused("its pickle has a shape that is none")
    return value


_ZERO_STAGE = "deepspeed.runtime.zero.config.ZeroStageEnum"
_ZERO_STAGES = ("disabled", "optimizer_states", "gradients", "weights")  # its members, by value
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_CALLABLES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _Machine._ordered_dict,
    "torch.Size": _Machine._size,
    "torch._utils._rebuild_tensor_v2": _Machine._tensor,
    "torch._utils._rebuild_parameter": _Machine._parameter,
    _FROM_TYPE: _Machine._with_attributes,
    "torch.device": _Machine._device,
    "builtins.getattr": _Machine._zero_stage,
    "__builtin__.getattr": _Machine._zero_stage,
}
STUBS = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        _ZERO_STAGE,
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
"""Classes of DeepSpeed's whose objects stand in its files; nothing of them is called."""
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in DTYPES.items()}
_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MUTABLE = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
