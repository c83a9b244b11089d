"""Which backend runs here, and why not another.

Nothing is required at installation: what is there at start-up is used, once it
has attended to a few tokens forward and backward.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Literal, NamedTuple, get_args

import torch
from packaging.version import Version
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megablip.errors import ConfigError
from megablip.model.attention import kernels
from megablip.model.attention.per_document import HALF
from megablip.model.packing import PackedLayout

Name = Literal["flash_attn", "torch_varlen", "per_document", "dense"]
"""Backends, as `model.attention` of a recipe names them."""

# The first whose signature is in tests/fixtures/attention_signatures.json.
_FLASH_ATTN_MIN = Version("2.7.0")


@dataclass(frozen=True, slots=True)
class Selection:
    """A backend, and what was passed over on the way to it.

    Attributes:
        kernel: what runs.
        passed_over: (kernel, why) of those that would have come first.
    """

    name: Name
    kernel: str
    passed_over: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        by_reason: dict[str, list[str]] = {}
        for kernel, why in self.passed_over:
            by_reason.setdefault(why, []).append(kernel)
        others = "".join(f"; passed over {', '.join(kernels)}: {why}" for why, kernels in by_reason.items())
        return f"{self.name} ({self.kernel}){others}"


class Needs(NamedTuple):
    """What attention is wanted for; `head_sizes` as far as they are known."""

    device_type: str
    dtype: torch.dtype
    head_sizes: tuple[int, ...] = ()

    @property
    def capability(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability()


class Candidate(NamedTuple):
    """One kernel.

    `obstacle` says why it can't run, None if it can as far as can be seen.
    `activate` makes it ready and may raise anything; `restore` takes that back.
    """

    name: Name
    kernel: str
    obstacle: Callable[[Needs], str | None]
    run: Callable[..., Tensor] | None = None  # None: nothing to try, it runs everywhere
    activate: Callable[[], None] = lambda: None
    restore: Callable[[], None] = lambda: None


def select_backend(
    device_type: str, dtype: torch.dtype, head_sizes: tuple[int, ...] = (), wanted: Name | Literal["auto"] = "auto"
) -> Selection:
    """The first kernel that can run on "cuda" or "cpu", made ready.

    Raises:
        ConfigError: the one that is `wanted` can't.
    """
    needs, passed_over = Needs(device_type, dtype, head_sizes), []
    for candidate in _candidates():
        if wanted not in ("auto", candidate.name) or (wanted == "auto" and candidate.name == "dense"):
            continue
        why = candidate.obstacle(needs) or _failure(candidate, needs)
        if why is None:
            return Selection(candidate.name, candidate.kernel, tuple(passed_over))
        passed_over.append((candidate.kernel, why))
    raise ConfigError(
        f"attention '{wanted}' can't run here: " + "; ".join(f"{kernel}: {why}" for kernel, why in passed_over),
        where="model.attention",
        remedy="set it to auto, which takes the fastest that can, or mend what is missing",
    )


_in_use: Name | None = None


def use_backend(name: Name | None) -> None:
    """Let this process's attention run on `name` from now on; None: on whatever `select_backend` finds."""
    global _in_use
    assert name is None or name in get_args(Name), name
    _in_use = name


def backend_for(device_type: str, dtype: torch.dtype, head_size: int) -> Name:
    """The backend in use for such tensors."""
    return _in_use or _found(device_type, dtype, head_size)


@cache
def _found(device_type: str, dtype: torch.dtype, head_size: int) -> Name:
    return select_backend(device_type, dtype, (head_size,)).name


def head_sizes(text_config, sampler: dict) -> tuple[int, ...]:
    """Those of the decoder and, where it has attention of this kind, of the sampler."""
    decoder = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return tuple({decoder, *([sampler["dim_head"]] if "dim_head" in sampler else [])})


def _failure(candidate: Candidate, needs: Needs) -> str | None:
    """Attend to a few tokens, forward and backward: packages, their builds and torch do not always fit together."""
    if candidate.run is None:
        return None
    try:
        candidate.activate()
        with _apart():
            for size in needs.head_sizes or (64,):
                x, layout = _few_tokens(needs, size)
                out = candidate.run(x, x, x, layout_q=layout, layout_k=layout, causal=True, scale=1.0, window=None)
                out.sum().backward()
                # The mean of a document's equal values.
                if not (torch.allclose(out, x, rtol=0.02) and x.grad.isfinite().all()):
                    raise ArithmeticError("its result is wrong")
    except Exception as error:
        candidate.restore()
        return f"it fails here ({type(error).__name__}: {error})"
    return None


@contextmanager
def _apart() -> Iterator[None]:
    """Gradients, whatever the caller's first attention runs in: without them, or in a block that is checkpointed.

    Checkpointing counts the tensors that its block keeps for the backward; only the innermost hooks see them.
    """
    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
        yield


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _few_tokens(needs: Needs, head_size: int) -> tuple[Tensor, PackedLayout]:
    """Two documents, the tokens of each with equal values."""
    x = torch.ones(17, 2, head_size, dtype=needs.dtype, device=needs.device_type)
    x[5:] = 2
    return x.requires_grad_(), PackedLayout.from_lengths([5, 12], needs.device_type)


# --- The kernels, in the order of preference ------------------------------------------


def _candidates() -> Iterator[Candidate]:
    """flash-attn 3 is made for Hopper, 4 for Blackwell; torch's built-in copy of 2 is older than the package."""
    yield from (_torch_with("FA3", "flash_attn_interface", 9), _torch_with("FA4", "flash_attn.cute.interface", 9, 10))
    version = _version("flash-attn")
    yield Candidate("flash_attn", f"flash-attn {version or 2}", _flash_attn_obstacle, kernels.flash_attn)
    yield Candidate("torch_varlen", f"torch {torch.__version__}'s own", _torch_obstacle, kernels.torch_varlen)
    yield Candidate("per_document", "SDPA per document", lambda needs: None)
    yield Candidate("dense", "SDPA with a block-diagonal mask", lambda needs: None)


def _gpu_obstacle(needs: Needs, largest_head: int = 256) -> str | None:
    """What all fused kernels ask for: flash-attn's README, "CUDA support", and its checks of the head size."""
    if needs.device_type != "cuda":
        return f"it needs a CUDA device, not {needs.device_type}"
    if needs.dtype not in HALF:
        return f"it takes bf16 and fp16, not {str(needs.dtype).removeprefix('torch.')}"
    if needs.capability < (8, 0):
        return f"it needs compute capability 8.0 (Ampere), not {needs.capability[0]}.{needs.capability[1]}"
    for size in needs.head_sizes:
        if size % 8 or size > largest_head:
            return f"it takes head sizes up to {largest_head} in steps of 8, not {size}"
    return None


def _flash_attn_obstacle(needs: Needs) -> str | None:
    if why := _gpu_obstacle(needs):
        return why
    # By its distribution: flash-attn 4 lives in the package flash_attn too, which may be there without version 2.
    version = _version("flash-attn")
    if version is None:
        return "flash-attn is not installed"
    return None if version >= _FLASH_ATTN_MIN else f"flash-attn {version} is older than {_FLASH_ATTN_MIN}"


def _torch_obstacle(needs: Needs) -> str | None:
    if why := _gpu_obstacle(needs):
        return why
    if not _is_importable("torch.nn.attention.varlen"):
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return None if torch.backends.cuda.is_flash_attention_available() else "torch was built without flash attention"


def _torch_with(version: str, module: str, *majors: int) -> Candidate:
    """A flash-attn that torch puts below its own attention where it is installed.

    Args:
        majors: of the compute capabilities that torch/nn/attention/_fa3.py and _fa4.py accept.
    """

    def obstacle(needs: Needs) -> str | None:
        if why := _torch_obstacle(needs):
            return why
        if needs.capability[0] not in majors:
            return f"it needs compute capability {' or '.join(f'{major}.x' for major in majors)}"
        if needs.capability >= (10, 0) and (why := _gpu_obstacle(needs, largest_head=128)):
            return why
        return None if _is_importable(module) else f"{module} is not installed"

    def activate() -> None:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl(version)

    def restore() -> None:
        from torch.nn.attention import restore_flash_attention_impl

        restore_flash_attention_impl()

    kernel = f"torch {torch.__version__} with {version}"
    return Candidate("torch_varlen", kernel, obstacle, kernels.torch_varlen, activate, restore)


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, OSError):  # a parent is missing, or does not load
        return False


def _version(package: str) -> Version | None:
    try:
        return Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None
