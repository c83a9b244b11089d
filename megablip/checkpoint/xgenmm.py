"""The released xGen-MM layout: its names and shapes, and where each value lies in ours.

    ours                          released (`vlm.` before it in Hugging Face files)
    vision_tower.*                vision_encoder.*
    sampler.*                     vision_tokenizer.*
    decoder.*                     lang_model.*

One thing differs beyond the names.  xGen-MM decouples the rows of its added
tokens (`<image>`, `<image placeholder>`, `<|endofchunk|>`) from the decoder's
tables of embeddings, of the head and of the head's bias: ids from
`first_added` on (initial_tokenizer_len, 32012) read small tables of 3 rows.
The large tables' rows from `first_added` on are dead: nothing reads them.
Ours has one table of each kind, with a row for each id.

    released  weight              [0 ............ 32012) dead [32012 ... 32064)
              additional_*                               [0..3)
    ours                          [0 ............ 32012) [32012..32015) spare rows, if any

This module is pure: shapes in, row ranges out.  Names and shapes are those of
salesforce/LAVIS, branch xgen-mm (vlm.py, helpers.py), and of the release v1.5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megablip.errors import CheckpointError
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.tokens import VISION_TOKENS

Shape = tuple[int, ...]

ADDED_TOKENS = len(VISION_TOKENS)
"""Rows of the small tables."""

PREFIX = "vlm."
"""Before each name in Hugging Face files; checkpoints of LAVIS have the bare name."""

_PARTS = {"vision_tower.": "vision_encoder.", "sampler.": "vision_tokenizer.", "decoder.": "lang_model."}

# Our table: the small table beside it.
_DECOUPLED = {
    "decoder.model.embed_tokens.weight": "lang_model.model.embed_tokens.additional_embedding.weight",
    "decoder.lm_head.weight": "lang_model.lm_head.additional_fc.weight",
    "decoder.lm_head.bias": "lang_model.lm_head.additional_fc.bias",
}
# A Perceiver resampler and a SigLIP tower; what else may stand in our model has no place there.
_RELEASED_PARTS = {
    "sampler.": re.compile(
        r"latents|layers\.\d+\.0\.(norm_(media|latents)\.(weight|bias)|to_(q|kv|out)\.weight)"
        r"|layers\.\d+\.1\.(0\.(weight|bias)|[13]\.weight)|(norm|projection)\.(weight|bias)"
    ),
    "vision_tower.": re.compile(
        r"embeddings\.(patch|position)_embedding\.(weight|bias)|post_layernorm\.(weight|bias)|head\.[\w.]+"
        r"|encoder\.layers\.\d+\.(layer_norm[12]|self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.(weight|bias)"
    ),
    "decoder.": re.compile(r"(?!.*lora)(model|lm_head)\.[\w.]+"),
}

_HEAD, _HEAD_BIAS = "decoder.lm_head.weight", "decoder.lm_head.bias"


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [start, end) of a released tensor; in `ours` they begin at row `ours_start`.

    A row is what one index of the first dimension holds; rows of a vector are numbers.
    """

    start: int
    end: int
    ours: str
    ours_start: int

    @property
    def ours_end(self) -> int:
        return self.ours_start + self.end - self.start


@dataclass(frozen=True, slots=True)
class ReleasedTensor:
    """A tensor of the released layout, and where its rows lie in ours.

    Attributes:
        name: without `vlm.`.
        rows: by rising start, without overlap.
    """

    name: str
    shape: Shape
    rows: tuple[Rows, ...]

    @property
    def unplaced(self) -> list[tuple[int, int]]:
        """Ranges of rows that have no place in ours; on the way back they are zeros."""
        return _gaps(((part.start, part.end) for part in self.rows), self.shape[0])


def released_layout(
    shapes: Mapping[str, Shape], *, first_added: int, table_rows: int | None = None
) -> list[ReleasedTensor]:
    """All tensors of the released layout of a model, by name.

    Args:
        shapes: of all our tensors (`model_shapes`, or the headers of our files).
            The released layout has a head bias and a SigLIP pooling head even where
            ours lacks them: without rows of ours, thus zeros.
        first_added: the id of `<image>`, the first of the added tokens (the
            model's image_token_id).
        table_rows: rows of the released large tables; by default ours, rounded
            up to a multiple of 64, as Phi-3's 32064 are.

    Raises:
        CheckpointError: a tensor that no part of the released layout has, or no
            row for an added token.
    """
    tensors = dict(shapes)
    if _HEAD in tensors:
        tensors.setdefault(_HEAD_BIAS, (0,))
    released = _missing_pooling_head(shapes)
    for name, shape in tensors.items():
        if name in _DECOUPLED:
            vocabulary = tensors[_HEAD][0] if name == _HEAD_BIAS else shape[0]
            if vocabulary < first_added + ADDED_TOKENS:
                raise CheckpointError(
                    f"{name} has {vocabulary} rows, too few for {ADDED_TOKENS} added tokens from id {first_added} on",
                    remedy="check image_token_id and text_config.vocab_size",
                )
            rows = -(-vocabulary // 64) * 64 if table_rows is None else table_rows
            released += _decoupled(name, shape, first_added, rows)
        else:
            whole = (Rows(0, shape[0], name, 0),)
            released.append(ReleasedTensor(released_name(name), tuple(shape), whole))
    return sorted(released, key=lambda tensor: tensor.name)


def _missing_pooling_head(shapes: Mapping[str, Shape]) -> list[ReleasedTensor]:
    """The tower's pooling head if the tower has none; its output is never used."""
    tower = "vision_tower."
    if f"{tower}head.probe" in shapes or f"{tower}post_layernorm.weight" not in shapes:
        return []
    (width,) = shapes[f"{tower}post_layernorm.weight"]
    inner = shapes[f"{tower}encoder.layers.0.mlp.fc1.weight"][0]
    head = {
        "probe": (1, 1, width),
        "attention.in_proj_weight": (3 * width, width),
        "attention.in_proj_bias": (3 * width,),
        "attention.out_proj.weight": (width, width),
        "attention.out_proj.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
        "mlp.fc1.weight": (inner, width),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (width, inner),
        "mlp.fc2.bias": (width,),
    }
    return [ReleasedTensor(f"vision_encoder.head.{name}", shape, ()) for name, shape in head.items()]


def _decoupled(name: str, shape: Shape, first_added: int, table_rows: int) -> Iterator[ReleasedTensor]:
    """The large and the small table of one of ours, whose rows may be none (a bias that we don't have)."""
    row, spare = tuple(shape[1:]), first_added + ADDED_TOKENS
    large, small = [], []
    if shape[0]:
        large = [Rows(0, min(first_added, table_rows), name, 0)]
        small = [Rows(0, ADDED_TOKENS, name, first_added)]
    if spare < min(shape[0], table_rows):  # dead there, spare here
        large.append(Rows(spare, min(shape[0], table_rows), name, spare))
    yield ReleasedTensor(released_name(name), (table_rows, *row), tuple(large))
    yield ReleasedTensor(_DECOUPLED[name], (ADDED_TOKENS, *row), tuple(small))


def released_name(ours: str) -> str:
    """`vision_tower.post_layernorm.bias` -> `vision_encoder.post_layernorm.bias`; the large table of a decoupled one.

    Raises:
        CheckpointError: the name belongs to no part of the released layout.
    """
    for part, released in _PARTS.items():
        if ours.startswith(part) and _RELEASED_PARTS[part].fullmatch(ours.removeprefix(part)):
            return released + ours.removeprefix(part)
    raise CheckpointError(
        f"{ours} has no place in the released layout",
        remedy="it has a SigLIP tower, a Perceiver resampler and a decoder, adapters merged",
    )


def bare_name(stored: str) -> str:
    """A released name as files have it, without what wrappers put in: `vlm.`, `module.`, checkpointing's wrapper."""
    name = stored.replace("_checkpoint_wrapped_module.", "").removeprefix("module.")
    return name.removeprefix(PREFIX)


def our_sources(released: Iterable[ReleasedTensor]) -> dict[str, list[tuple[ReleasedTensor, Rows]]]:
    """For each of our tensors the released rows that it is made of, by rising place in ours."""
    sources: dict[str, list[tuple[ReleasedTensor, Rows]]] = {}
    for tensor in released:
        for part in tensor.rows:
            sources.setdefault(part.ours, []).append((tensor, part))
    for parts in sources.values():
        parts.sort(key=lambda source: source[1].ours_start)
    return sources


def our_unfilled(released: Iterable[ReleasedTensor], shapes: Mapping[str, Shape]) -> dict[str, list[tuple[int, int]]]:
    """Ranges of rows of ours that nothing of the released layout fills, by name; only names that have some."""
    sources = our_sources(released)
    gaps = {
        name: _gaps(((part.ours_start, part.ours_end) for _, part in sources.get(name, [])), shape[0])
        for name, shape in shapes.items()
    }
    return {name: ranges for name, ranges in gaps.items() if ranges}


def released_config() -> Blip3Config:
    """The config of the release v1.5.

    With a row for each id and none more (32015, where the large tables have 32064):
    the softmax is then over the released model's logits, no others.
    """
    config = Blip3Config(tile_layout="released")
    config.text_config.vocab_size = config.image_token_id + ADDED_TOKENS
    config.text_config.eos_token_id = [32000, 32007]  # <|endoftext|>, and <|end|> of a turn
    return config


def model_shapes(config: Blip3Config) -> dict[str, Shape]:
    """Shapes of all tensors of the model of a Blip3Config, by name; nothing is allocated."""
    with torch.device("meta"):
        model = Blip3ForConditionalGeneration(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _gaps(ranges: Iterable[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """What of [0, length) the ranges, by rising start, leave out."""
    gaps, at = [], 0
    for start, end in ranges:
        if start > at:
            gaps.append((at, start))
        at = max(at, end)
    return [*gaps, (at, length)] if at < length else gaps
