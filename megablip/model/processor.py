"""From prompts and images to what the model's inference forward takes."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image

from megablip.data.images import choose_grid, image_size, make_tiles
from megablip.errors import ConfigError, SampleError
from megablip.records import VisualLayout
from megablip.tokens import CHAT_TOKENS, END_OF_CHUNK_TOKEN, IMAGE_TOKEN, PAD_TOKEN, PHI3_TEMPLATE

# Around the text of a message (private-use characters), to tell it from what the template writes.
_OPEN, _CLOSE = "\U000f0000", "\U000f0001"
_MARKED = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)

# White space as tokenizers has it: Unicode's, which leaves out four characters that Python's has.
_SPACE = r"[^\S\x1c-\x1f]"

# What PNG can hold of Pillow's modes; others become RGB.
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


class Blip3Processor(ProcessorMixin):
    """Tokenizer and tile maker of one model.

    In a prompt, `<image>` stands for one image and becomes as many ids as it has
    visual tokens; `<|endofchunk|>` and the control tokens that the chat template
    writes become their ids.  All else is encoded as data workers encode documents:
    no other control token can be written in text.

    `apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)`
    goes from messages, images among them, to the model's inputs: the ids that training
    gives the same conversation.  There no text of a message can be a control token.
    (Without `add_generation_prompt` some templates, such as Phi-3's, write eos too.)

    Args:
        tokenizer: a Hugging Face tokenizer with these tokens and `<pad>`.
        chat_template: in Jinja, for messages of plain text; by default the tokenizer's, or
            Phi-3's if the tokenizer has its tokens.
        tile_size, patch_size, tokens_per_tile, grids, grid_rule, tokens_per_image: the model's VisualLayout.
    """

    def __init__(
        self,
        tokenizer=None,
        tile_size: int = 384,
        patch_size: int = 14,
        tokens_per_tile: int = 128,
        grids: Sequence[Sequence[int]] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
        grid_rule: str = "released",
        tokens_per_image: int = 0,
        chat_template: str | None = None,
    ):
        if chat_template is None and tokenizer is not None:
            has_phi3s = set(CHAT_TOKENS.values()) <= tokenizer.get_vocab().keys()
            chat_template = tokenizer.chat_template or (PHI3_TEMPLATE if has_phi3s else None)
        super().__init__(tokenizer, chat_template=chat_template)
        self.tile_size, self.patch_size = tile_size, patch_size
        self.tokens_per_tile, self.tokens_per_image = tokens_per_tile, tokens_per_image
        self.grids = [list(grid) for grid in grids]
        self.grid_rule = grid_rule

    @property
    def layout(self) -> VisualLayout:
        grids = tuple((columns, rows) for columns, rows in self.grids)
        return VisualLayout(
            self.tile_size, self.patch_size, self.tokens_per_tile, grids, self.grid_rule, self.tokens_per_image
        )

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
        layout, markers = self.layout, self._markers()

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
        rows = [self._encode(prompt, markers, remaining, add_special_tokens) for prompt in prompts]
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

    def apply_chat_template(
        self,
        conversation: list[Any],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str = "pt",
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | Tensor | BatchFeature:
        """Messages, or a batch of them, to a prompt for `__call__`, or with `tokenize` to what that returns.

        Args:
            conversation: messages `{"role": ..., "content": ...}`; a content is text, or a list of
                `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`, where an image is what
                `__call__` takes, under the key image, url, path, base64 or image_url.
            return_dict: with `tokenize`, all inputs of the model; else the ids alone.
            kwargs: for the template, such as `add_generation_prompt`.

        Raises:
            ConfigError: a part of a message is neither text nor image, or the template takes texts apart.
        """
        batched = len(conversation) > 0 and isinstance(conversation[0], list | tuple)
        images: list[list[Any]] = []
        plain = []
        for messages in conversation if batched else [conversation]:
            images.append([])
            plain.append([message | {"content": _plain(message, images[-1], mark=tokenize)} for message in messages])
        prompts = super().apply_chat_template(plain, chat_template, tokenize=False, **kwargs)
        if not tokenize:
            return prompts if batched else prompts[0]
        inputs = self(prompts, images, return_tensors=return_tensors, **processor_kwargs or {})
        return inputs if return_dict else inputs["input_ids"]

    def _encode(
        self, prompt: str, markers: dict[str, int], grids: Iterator[tuple[int, int]], add_special_tokens: bool
    ) -> list[int]:
        """Ids of one prompt; takes a grid from `grids` for each of its images."""
        bos = self.tokenizer.bos_token_id
        row = [] if bos is None or not add_special_tokens else [bos]
        for number, piece in enumerate(_MARKED.split(prompt)):
            if number % 2:
                row += self._encode_text(piece)
                continue
            if _OPEN in piece or _CLOSE in piece:
                raise ConfigError("the chat template takes the text of a message apart", remedy="write a plain one")
            for part in re.split(f"({'|'.join(map(re.escape, markers))})", self._without_owned_space(piece, markers)):
                if part == IMAGE_TOKEN:
                    row += [markers[IMAGE_TOKEN]] * self.layout.visual_tokens(next(grids))
                elif part not in markers:
                    row += self._encode_text(part)
                elif markers[part] != bos or row != [bos]:  # of two bos at the start the template wrote one
                    row.append(markers[part])
        return row

    def _without_owned_space(self, piece: str, markers: dict[str, int]) -> str:
        """`piece` without the white space that belongs to the markers beside it, as Phi-3's line ends do."""
        added = self.tokenizer.added_tokens_decoder
        for token, number in markers.items():
            if added[number].lstrip:
                piece = re.sub(rf"{_SPACE}+(?={re.escape(token)})", "", piece)
            if added[number].rstrip:
                piece = re.sub(rf"(?<={re.escape(token)}){_SPACE}+", "", piece)
        return piece

    def _encode_text(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []

    def _markers(self) -> dict[str, int]:
        """What stands for itself in a prompt, longest first, and its ids."""
        vocabulary = self.tokenizer.get_vocab()
        for token in (IMAGE_TOKEN, END_OF_CHUNK_TOKEN, PAD_TOKEN):
            if token not in vocabulary:
                raise ConfigError(f"the tokenizer has no {token}", where=str(self.tokenizer.name_or_path))
        tokens = {IMAGE_TOKEN, END_OF_CHUNK_TOKEN, *self._template_tokens()}
        return {token: vocabulary[token] for token in sorted(tokens, key=len, reverse=True)}

    def _template_tokens(self) -> set[str]:
        """Control tokens that the chat template writes."""
        if self.chat_template is None:
            return set()
        from jinja2 import TemplateError  # transformers needs it for templates only

        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        found: set[str] = set()
        for roles, asked in (
            (("user", "assistant"), True),
            (("user", "assistant"), False),  # some write eos here
            (("system", "user"), True),  # some refuse the system's turn
        ):
            with suppress(TemplateError):
                messages = [{"role": role, "content": ""} for role in roles]
                text = super().apply_chat_template(messages, add_generation_prompt=asked)
                found |= {token for token in special if token in text}
        return found


def _plain(message: dict[str, Any], images: list[Any], mark: bool) -> str:
    """A message's content as text; its images are appended to `images`.

    Args:
        mark: put each text between _OPEN and _CLOSE.
    """
    parts = message["content"]
    text = ""
    for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
        if part["type"] == "text":
            own = part["text"].replace(_OPEN, "").replace(_CLOSE, "")
            text += f"{_OPEN}{own}{_CLOSE}" if mark else own
        elif part["type"] in ("image", "image_url"):
            text += IMAGE_TOKEN
            images += [part[key] for key in ("image", "url", "path", "base64") if key in part]
            if "image_url" in part:
                images.append(part["image_url"]["url"])
        else:
            raise ConfigError(
                f"a message has a part of the type {part['type']}", where="content", remedy="give text and images only"
            )
    return text


def _flatten(prompts: list[str], images: Any) -> list[Any]:
    """The batch's images in order, after a check against the prompts' markers."""
    if images is None:
        images = []
    elif not isinstance(images, list | tuple):
        images = [images]
    wanted = [_MARKED.sub("", prompt).count(IMAGE_TOKEN) for prompt in prompts]
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
