"""From prompts and images to what the model's inference forward takes."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, ProcessorMixin

from megablip.data.images import choose_grid, image_size, make_tiles
from megablip.errors import ConfigError, SampleError
from megablip.records import VisualLayout
from megablip.tokens import END_OF_CHUNK_TOKEN, IMAGE_TOKEN, PAD_TOKEN

_MARKERS = re.compile(f"({re.escape(IMAGE_TOKEN)}|{re.escape(END_OF_CHUNK_TOKEN)})")

# What PNG can hold of Pillow's modes; others become RGB.
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


class Blip3Processor(ProcessorMixin):
    """Tokenizer and tile maker of one model.

    In a prompt, `<image>` stands for one image and becomes as many ids as it has
    visual tokens; `<|endofchunk|>` becomes its id.  All else is encoded as data
    workers encode documents: no other control token can be written in text.

    Args:
        tokenizer: a Hugging Face tokenizer with these tokens and `<pad>`.
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
        images: Image.Image | bytes | Sequence[Any] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """One prompt or a batch of them, padded on the left.

        Args:
            images: Pillow images or the bytes of image files, in the order of the
                `<image>` markers: a flat list, or one list for each prompt.

        Returns:
            input_ids, attention_mask: int64[B, L]; tiles: uint8[N, 3, S, S];
            patch_mask: bool[N, P]; grids: int32[I, 2] of (columns, rows).

        Raises:
            ConfigError: markers and images differ in number.
            SampleError: an image can't be decoded.
        """
        if return_tensors != "pt":
            raise ConfigError(f"return_tensors is '{return_tensors}'", remedy="use 'pt', the only kind there is")
        prompts = [text] if isinstance(text, str) else list(text)
        images = _flatten(prompts, images)
        layout, ids = self.layout, {name: self._id(name) for name in (IMAGE_TOKEN, END_OF_CHUNK_TOKEN, PAD_TOKEN)}

        # Empty starts give the right shapes to a batch without images.
        tiles = [np.zeros((0, 3, layout.tile_size, layout.tile_size), dtype=np.uint8)]
        masks = [np.zeros((0, layout.patches_per_tile), dtype=bool)]
        grids: list[tuple[int, int]] = []
        for number, image in enumerate(images):
            data = image if isinstance(image, bytes) else _png(image)
            try:
                grids.append(choose_grid(image_size(data), layout))
                image_tiles, image_mask = make_tiles(data, grids[-1], layout)
            except SampleError as error:
                raise SampleError(error.what, where=f"image {number} of the batch", remedy=error.remedy) from None
            tiles.append(image_tiles)
            masks.append(image_mask)

        remaining = iter(grids)
        rows = [self._encode(prompt, ids, remaining) for prompt in prompts]
        length = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), length), ids[PAD_TOKEN], dtype=torch.int64)
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

    def _encode(self, prompt: str, ids: dict[str, int], grids) -> list[int]:
        """Ids of one prompt; takes a grid from `grids` for each of its images."""
        row = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        for piece in _MARKERS.split(prompt):
            if piece == IMAGE_TOKEN:
                row += [ids[IMAGE_TOKEN]] * (self.layout.tiles(next(grids)) * self.tokens_per_tile)
            elif piece == END_OF_CHUNK_TOKEN:
                row.append(ids[END_OF_CHUNK_TOKEN])
            elif piece:
                row += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return row

    def _id(self, token: str) -> int:
        number = self.tokenizer.get_vocab().get(token)
        if number is None:
            raise ConfigError(f"the tokenizer has no {token}", where=str(self.tokenizer.name_or_path))
        return number


def _flatten(prompts: list[str], images: Image.Image | bytes | Sequence[Any] | None) -> list[Image.Image | bytes]:
    """The batch's images in order, after a check against the prompts' markers."""
    if images is None:
        images = []
    elif isinstance(images, Image.Image | bytes):
        images = [images]
    wanted = [prompt.count(IMAGE_TOKEN) for prompt in prompts]
    nested = len(images) > 0 and all(isinstance(row, Sequence) and not isinstance(row, bytes) for row in images)
    given = [len(row) for row in images] if nested else [len(images)]
    if given != (wanted if nested else [sum(wanted)]):
        raise ConfigError(
            f"the prompts have {wanted} {IMAGE_TOKEN} markers, but {given} images were given",
            remedy="give one image for each marker",
        )
    return list(chain.from_iterable(images)) if nested else list(images)


def _png(image: Image.Image) -> bytes:
    """An upright copy, lossless."""
    image = ImageOps.exif_transpose(image)
    buffer = io.BytesIO()
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
