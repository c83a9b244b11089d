"""Adapters added to the weights they lie beside: W + scale * B A (arXiv 2106.09685).

    megablip convert merge-lora ADAPTER BASE OUTPUT

ADAPTER is a folder that peft saved, of any target layers, also fused ones, for
a linear layer has a name whatever it computes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch

from megablip.checkpoint.export import ExportReader
from megablip.checkpoint.tensors import TensorFile, TensorSource
from megablip.checkpoint.writer import ShardWriter, new_folder, precision
from megablip.convert.folders import copy_companions, say_written
from megablip.convert.sources import Joined, copy
from megablip.errors import CheckpointError, ConfigError

_PREFIX = "base_model.model."
_OTHER_FORMULAS = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "layer_replication", "target_parameters", "trainable_token_indices",
)  # fmt: skip
"""Keys of adapter_config.json (peft 0.21) that make merging something else than W + scale * B A."""


@dataclass(frozen=True)
class Adapter:
    """The two matrices of one layer, A [rank, in] and B [out, rank], read when they are needed.

    Attributes:
        a, b: their names in `source`.
        transposed: the weight is [in, out], as an embedding's is.
    """

    source: TensorSource
    a: str
    b: str
    scale: float
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        shapes = self.source.shapes
        shape = (shapes[self.b][0], shapes[self.a][1])
        return shape[::-1] if self.transposed else shape

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Rows of what is added to the weight, fp32."""
        a, b = self._matrix(self.a), self._matrix(self.b)
        product = a[:, start:end].T @ b.T if self.transposed else b[start:end] @ a
        return product.mul_(self.scale)

    def _matrix(self, name: str) -> torch.Tensor:
        shape = self.source.shapes[name]
        return self.source.elements(name, 0, math.prod(shape)).view(shape).float()


class Merged:
    """A source whose weights have their adapters added, in fp32.

    Raises:
        CheckpointError: an adapter of a weight that is not there or has another shape.
    """

    def __init__(self, base: TensorSource, adapters: Mapping[str, Adapter]):
        self.where, self._base, self._adapters = base.where, base, adapters
        self.shapes = base.shapes
        self.dtypes = base.dtypes | dict.fromkeys(adapters, torch.float32)
        for name, adapter in adapters.items():
            found = self.shapes.get(name)
            if found != adapter.shape:
                raise CheckpointError(
                    f"an adapter is for {name} {adapter.shape}, "
                    + ("which the base lacks" if found is None else f"which is {found}"),
                    where=str(base.where),
                    remedy="give the base that the adapter was trained on",
                )

    def elements(self, name: str, start: int, end: int) -> torch.Tensor:
        stored = self._base.elements(name, start, end)
        adapter = self._adapters.get(name)
        if adapter is None:
            return stored
        width = adapter.shape[1]
        first, last = start // width, -(-end // width)
        return stored + adapter.rows(first, last).flatten()[start - first * width : end - first * width]


def merge_lora(
    adapter: Path, base: Path, output: Path, dtype: str = "fp32", remote_code: bool = False, any_base: bool = False
) -> None:
    """Write a base model with an adapter merged in, tensor by tensor.

    Args:
        adapter: folder that peft saved (adapter_config.json, adapter_model.safetensors).
        base: the Hugging Face folder that it was trained on; any model's.
        dtype: fp32, bf16 or fp16; sums are in fp32.
        any_base: merge also where the adapter names another base than this folder's name.

    Raises:
        CheckpointError: an adapter of another kind or for another model.
        ConfigError: the adapter names another base, `output` exists, or an unknown dtype.
    """
    torch_dtype = precision(dtype)
    if not any_base:
        _check_base(adapter, base)
    weights = with_adapter(ExportReader(base), adapter)
    with new_folder(output) as staging:
        copy_companions(base, staging, torch_dtype, remote_code=remote_code)
        with ShardWriter(staging, weights.shapes, torch_dtype, title="merging") as writer:
            copy(weights, writer)
    say_written(output, adapter)


def _check_base(adapter: Path, base: Path) -> None:
    """Another model of the same shapes would give a merged model of no use, without a sign of it."""
    named = _read_config(adapter / "adapter_config.json").get("base_model_name_or_path")
    if named and PurePath(str(named)).name not in (base.absolute().name, base.resolve().name):
        raise ConfigError(
            f"the adapter was made for {named}, and the base is {base}",
            where=str(adapter / "adapter_config.json"),
            remedy="give the base that it names; names are all that can be compared, since an adapter keeps nothing of "
            "its base's weights: if this is the base under another name, go on with --any-base",
        )


def with_adapter(base: TensorSource, folder: Path) -> TensorSource:
    """The base with what a folder of peft's adds to it or puts in its place (`modules_to_save`)."""
    config = _read_config(folder / "adapter_config.json")
    stored = TensorFile(folder / "adapter_model.safetensors")
    matrices: dict[str, dict[str, str]] = {}
    replaced: dict[str, tuple[TensorSource, str]] = {}
    for key in stored.shapes:
        module, kind = _split(key)
        if kind is None:
            replaced[module] = (stored, key)
        else:
            matrices.setdefault(module, {})[kind] = key
    adapters = {}
    for module, found in matrices.items():
        kinds = set(found)
        embedding = kinds == {"lora_embedding_A", "lora_embedding_B"}
        if not embedding and kinds != {"lora_A", "lora_B"}:
            raise CheckpointError(f"{module} has {', '.join(sorted(kinds))}", where=str(folder), remedy=_HALF)
        a, b = (found[kind] for kind in sorted(kinds))
        of_a, of_b = stored.shapes[a], stored.shapes[b]
        if len(of_a) != 2 or len(of_b) != 2 or of_a[0] != of_b[1]:
            raise CheckpointError(
                f"the adapter of {module} has matrices {of_a} and {of_b}", where=str(folder), remedy=_HALF
            )
        scale = _scale(config, module, of_a[0])
        transposed = embedding or bool(config.get("fan_in_fan_out"))
        adapters[f"{module}.weight"] = Adapter(stored, a, b, scale, transposed)
    shapes = base.shapes
    for name, (_, key) in replaced.items():
        if shapes.get(name) != stored.shapes[key]:
            raise CheckpointError(
                f"{name} {stored.shapes[key]} is saved beside the adapters, and the base has {shapes.get(name)}",
                where=str(folder),
                remedy="give the base that the adapter was trained on",
            )
    return Merged(Joined(base.where, {name: (base, name) for name in shapes} | replaced), adapters)


_HALF = "only the two matrices of linear layers and embeddings can be merged"


def _split(key: str) -> tuple[str, str | None]:
    """Module and kind of matrix; of a weight saved whole its name, and None."""
    name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.startswith("lora_"):
            return ".".join(parts[:place]), part
        if part == "modules_to_save":
            rest = parts[place + 1 :]
            return ".".join(parts[:place] + rest[-1:]), None  # an adapter's name may stand between
    return name, None


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) (rank-stabilised, arXiv 2312.03732)."""
    patterns = config.get("alpha_pattern") or {}
    # As peft matches them: a pattern is the end of a name, from a dot on.
    matching = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
    alpha = matching[0] if matching else config["lora_alpha"]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
        float(config["lora_alpha"] if kind == "LORA" else 0)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"the adapter's config can't be read: {type(error).__name__}: {error}",
            where=str(path),
            remedy="name a folder that peft has saved",
        ) from None
    other = [key for key in _OTHER_FORMULAS if config.get(key)]
    if kind != "LORA" or other:
        raise CheckpointError(
            f"the adapter uses {', '.join(other) or kind}, which can't be merged here",
            where=str(path),
            remedy="merge it with peft",
        )
    return config
