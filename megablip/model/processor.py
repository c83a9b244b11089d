"""From prompts and images to what the model's inference forward takes."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image

from megablip.data.images import choose_grid, image_size, make_tiles
from megablip.errors import ConfigError, SampleError
from megablip.records import VisualLayout
from megablip.tokens import CHAT_TOKENS, END_OF_CHUNK_TOKEN, IMAGE_TOKEN, PAD_TOKEN

_MARKERS = (IMAGE_TOKEN, END_OF_CHUNK_TOKEN, *CHAT_TOKENS.values())

# Put into a marker that stands in the text of a message (a private-use character), it makes it text.
_GUARD = "\U000f0000"

# Phi-3's format, as data.encode lays out conversations.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] not in ('system', 'user', 'assistant') -%}
        {{- raise_exception('a message has the role ' ~ message['role'] ~ ', not system, user or assistant') -}}
    {%- endif -%}
    {{- '<|' + message['role'] + '|>\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {{- '<image>' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- else -%}
                {{- raise_exception('a message has a part of the type ' ~ part['type'] ~ ', not text or image') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>\n' -}}
{%- endif -%}
"""

# What PNG can hold of Pillow's modes; others become RGB.
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


class Blip3Processor(ProcessorMixin):
    """Tokenizer and tile maker of one model.

    In a prompt, `<image>` stands for one image and becomes as many ids as it has
    visual tokens; `<|endofchunk|>`, and the tokens of Phi-3's chat format where the
    tokenizer has them, become their ids.  All else is encoded as data workers encode
    documents: no other control token can be written in text.

    `apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)`
    goes from messages, images among them, to the model's inputs.  There no text of a
    message can be a control token.

    Args:
        tokenizer: a Hugging Face tokenizer with these tokens and `<pad>`.
        chat_template: in Jinja; by default Phi-3's, if the tokenizer has its tokens.
        tile_size, patch_size, tokens_per_tile, grids, grid_rule: the model's VisualLayout.
    """

    def __init__(
        self,
        tokenizer=None,
        tile_size: int = 384,
        patch_size: int = 14,
        tokens_per_tile: int = 128,
        grids: Sequence[Sequence[int]] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
        grid_rule: str = "released",
        chat_template: str | None = None,
    ):
        if chat_template is None and tokenizer is not None and _can_chat(tokenizer):
            chat_template = CHAT_TEMPLATE
        super().__init__(tokenizer, chat_template=chat_template)
        self.tile_size, self.patch_size, self.tokens_per_tile = tile_size, patch_size, tokens_per_tile
        self.grids = [list(grid) for grid in grids]
        self.grid_rule = grid_rule

    @property
    def layout(self) -> VisualLayout:
        grids = tuple((columns, rows) for columns, rows in self.grids)
        return VisualLayout(self.tile_size, self.patch_size, self.tokens_per_tile, grids, self.grid_rule)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "tiles", "patch_mask", "grids"]

    def __call__(
        self,
        text: str | Sequence[str],
        images: Image.Image | bytes | str | Path | Sequence[Any] | None = None,
        videos: None = None,
        audio: None = None,
        return_tensors: str = "pt",
        padding: bool | str = True,
        add_special_tokens: bool = True,
    ) -> BatchFeature:
        """One prompt or a batch of them, padded on the left.

        Args:
            images: Pillow images, bytes or paths of image files, or URLs, in the order
                of the `<image>` markers: a flat list, or one list for each prompt.
            videos, audio: none; for callers that know no better.
            padding: to the longest prompt, the only kind there is.
            add_special_tokens: begin each prompt with bos, if the tokenizer has one.

        Returns:
            input_ids, attention_mask: int64[B, L]; tiles: uint8[N, 3, S, S];
            patch_mask: bool[N, P]; grids: int32[I, 2] of (columns, rows).

        Raises:
            ConfigError: markers and images differ in number.
            SampleError: an image can't be decoded.
        """
        for name, value, only in (
            ("return_tensors", return_tensors, ("pt",)),
            ("padding", padding, (True, "longest")),
            ("videos", videos, (None,)),
            ("audio", audio, (None,)),
        ):
            if value not in only:
                raise ConfigError(f"{name} is {value!r}", remedy=f"use {only[0]!r}, the only kind there is")
        prompts = [text] if isinstance(text, str) else list(text)
        images = _flatten(prompts, images)
        layout, ids = self.layout, self._marker_ids()

        # Empty starts give the right shapes to a batch without images.
        tiles = [np.zeros((0, 3, layout.tile_size, layout.tile_size), dtype=np.uint8)]
        masks = [np.zeros((0, layout.patches_per_tile), dtype=bool)]
        grids: list[tuple[int, int]] = []
        for number, image in enumerate(images):
            try:
                data = _bytes(image)
                grids.append(choose_grid(image_size(data), layout))
                image_tiles, image_mask = make_tiles(data, grids[-1], layout)
            except SampleError as error:
                raise SampleError(error.what, where=f"image {number} of the batch", remedy=error.remedy) from None
            tiles.append(image_tiles)
            masks.append(image_mask)

        remaining = iter(grids)
        bos = [] if self.tokenizer.bos_token_id is None or not add_special_tokens else [self.tokenizer.bos_token_id]
        rows = [bos + self._encode(prompt, ids, remaining) for prompt in prompts]
        length = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), length), self.tokenizer.convert_tokens_to_ids(PAD_TOKEN), dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for number, row in enumerate(rows):
            input_ids[number, length - len(row) :] = torch.tensor(row)
            attention_mask[number, length - len(row) :] = 1
        return BatchFeature(
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "tiles": torch.from_numpy(np.concatenate(tiles)),
                "patch_mask": torch.from_numpy(np.concatenate(masks)),
                "grids": torch.tensor(grids, dtype=torch.int32).reshape(-1, 2),
            }
        )

    def apply_chat_template(self, conversation, *args, tokenize: bool = False, **kwargs):
        """As any processor's; see the class.  Without `tokenize` it is the prompt as text, for `__call__`."""
        if tokenize:
            kwargs.pop("sanitize_control_tokens", None)  # so it is, always
            conversation = _guarded(conversation)
        return super().apply_chat_template(conversation, *args, tokenize=tokenize, **kwargs)

    def _encode(self, prompt: str, ids: dict[str, int], grids: Iterator[tuple[int, int]]) -> list[int]:
        """Ids of one prompt; takes a grid from `grids` for each of its images."""
        turns = {ids[token] for token in CHAT_TOKENS.values() if token in ids}
        row: list[int] = []
        for piece in re.split(f"({_any_of(ids)})", prompt):
            if piece == IMAGE_TOKEN:
                row += [ids[IMAGE_TOKEN]] * (self.layout.tiles(next(grids)) * self.tokens_per_tile)
            elif piece in ids:
                row.append(ids[piece])
            else:  # the end of the line of a turn's token is encoded by itself, as in training
                line_end = "\n" if piece.startswith("\n") and row and row[-1] in turns else ""
                row += self._encode_text(line_end)
                row += self._encode_text(piece.removeprefix(line_end).replace(_GUARD, ""))
        return row

    def _encode_text(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []

    def _marker_ids(self) -> dict[str, int]:
        """Ids of what stands for itself in a prompt."""
        vocabulary = self.tokenizer.get_vocab()
        for token in (IMAGE_TOKEN, END_OF_CHUNK_TOKEN, PAD_TOKEN):
            if token not in vocabulary:
                raise ConfigError(f"the tokenizer has no {token}", where=str(self.tokenizer.name_or_path))
        markers = _MARKERS if _can_chat(self.tokenizer) else (IMAGE_TOKEN, END_OF_CHUNK_TOKEN)
        return {token: vocabulary[token] for token in markers}


def _can_chat(tokenizer) -> bool:
    return set(CHAT_TOKENS.values()) <= tokenizer.get_vocab().keys()


def _any_of(tokens: Iterable[str]) -> str:
    """A pattern of any of them."""
    return "|".join(map(re.escape, tokens))


def _guarded(content: Any) -> Any:
    """Messages whose texts hold no marker any more; those of the template stay what they are."""
    if isinstance(content, str):
        return re.sub(_any_of(_MARKERS), lambda match: match[0][0] + _GUARD + match[0][1:], content.replace(_GUARD, ""))
    if isinstance(content, dict):
        texts = {key: _guarded(content[key]) for key in ("content", "text") if key in content}
        return content | texts
    if isinstance(content, list | tuple):
        return [_guarded(part) for part in content]
    return content


def _flatten(prompts: list[str], images: Any) -> list[Any]:
    """The batch's images in order, after a check against the prompts' markers."""
    if images is None:
        images = []
    elif not isinstance(images, list | tuple):
        images = [images]
    wanted = [prompt.count(IMAGE_TOKEN) for prompt in prompts]
    nested = len(images) > 0 and all(isinstance(row, list | tuple) for row in images)
    given = [len(row) for row in images] if nested else [len(images)]
    if given != (wanted if nested else [sum(wanted)]):
        raise ConfigError(
            f"the prompts have {wanted} {IMAGE_TOKEN} markers, but {given} images were given",
            remedy="give one image for each marker",
        )
    return list(chain.from_iterable(images)) if nested else list(images)


def _bytes(image: Image.Image | bytes | str | Path) -> bytes:
    """An image as a file's bytes; what Pillow has decoded already, upright and lossless."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, Path) or (isinstance(image, str) and os.path.isfile(image)):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise SampleError(f"the image can't be read: {error}") from None
    if isinstance(image, str):  # a URL, or a file in base64
        image = load_image(image)
    image = ImageOps.exif_transpose(image)
    buffer = io.BytesIO()
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
