"""From a Document to token ids and labels, and on to pixels.

    bos  text  <image> * n  caption  <|endofchunk|>  <image> * n  caption  <|endofchunk|>  eos

Each visual token has an `<image>` id of its own, so lengths and positions are
explicit.  A chunk is an image (or several in a row) and the text that follows;
`<|endofchunk|>` ends it, as in OpenFlamingo, and a model that writes captions
learns there to stop.
"""

from __future__ import annotations

import numpy as np

from megablip.data.images import choose_grid, image_size, make_tiles
from megablip.errors import SampleError
from megablip.records import (
    IGNORE_LABEL,
    DecodedDocument,
    Document,
    EncodedDocument,
    EncodedImage,
    Text,
    VisualLayout,
)
from megablip.tokens import Tokenizer


class Encoder:
    """Documents to ids, for one tokenizer folder and one visual layout.

    Raises:
        ConfigError: the tokenizer can't be read or lacks a special token.
    """

    def __init__(self, tokenizer_path: str, layout: VisualLayout):
        self.tokenizer = Tokenizer(tokenizer_path)
        self.layout = layout

    def encode(self, document: Document) -> EncodedDocument:
        """Ids, labels and image positions; of images only the headers are read.

        Trained: text whose segment says so, the `<|endofchunk|>` that closes it,
        and eos.  (xGen-MM's released code masks `<|endofchunk|>`, with a note
        that its authors would rather not: few-shot captions stop by it.)
        Never trained: bos and `<image>`.

        Raises:
            SampleError: an image's header can't be read.
        """
        tokenizer, layout = self.tokenizer, self.layout
        ids: list[int] = []
        labels: list[int] = []
        images: list[EncodedImage] = []
        previous: Text | None = None  # the text that the next image, or the end, would close

        def append(new: list[int], loss: bool) -> None:
            ids.extend(new)
            labels.extend(new if loss else [IGNORE_LABEL] * len(new))

        def close_chunk() -> None:
            if images and previous is not None:
                append([tokenizer.end_of_chunk_id], previous.loss)

        if tokenizer.bos_id is not None:
            append([tokenizer.bos_id], loss=False)
        for segment in document.segments:
            if isinstance(segment, Text):
                append(tokenizer.encode(segment.text), segment.loss)
                previous = segment
                continue
            close_chunk()
            previous = None
            grid = self._grid(segment.data, document, len(images))
            images.append(EncodedImage(segment.data, grid, start=len(ids)))
            append([tokenizer.image_id] * (layout.tiles(grid) * layout.tokens_per_tile), loss=False)
        close_chunk()
        append([tokenizer.eos_id], loss=True)
        return EncodedDocument(
            np.array(ids, dtype=np.int32),
            np.array(labels, dtype=np.int32),
            tuple(images),
            document.source,
            document.key,
        )

    def decode(self, encoded: EncodedDocument, source_index: int) -> DecodedDocument:
        """Cut the document's images into tiles.

        Raises:
            SampleError: an image is broken.
        """
        layout = self.layout
        # Empty starts give the right shapes to a document without images.
        tiles = [np.zeros((0, 3, layout.tile_size, layout.tile_size), dtype=np.uint8)]
        masks = [np.zeros((0, layout.patches_per_tile), dtype=bool)]
        positions = [np.zeros(0, dtype=np.int32)]
        for number, image in enumerate(encoded.images):
            try:
                image_tiles, image_mask = make_tiles(image.data, image.grid, layout)
            except SampleError as error:
                raise _located(error, encoded, number) from None
            tiles.append(image_tiles)
            masks.append(image_mask)
            end = image.start + len(image_tiles) * layout.tokens_per_tile
            positions.append(np.arange(image.start, end, dtype=np.int32))
        return DecodedDocument(
            input_ids=encoded.input_ids,
            labels=encoded.labels,
            visual_positions=np.concatenate(positions),
            tiles=np.concatenate(tiles),
            patch_mask=np.concatenate(masks),
            grids=np.array([image.grid for image in encoded.images], dtype=np.int32).reshape(-1, 2),
            source=source_index,
            key=encoded.key,
        )

    def _grid(self, data: bytes, document: Document, number: int) -> tuple[int, int]:
        try:
            return choose_grid(image_size(data), self.layout.grids, self.layout.tile_size)
        except SampleError as error:
            raise _located(error, document, number) from None


def _located(error: SampleError, document: Document | EncodedDocument, image_number: int) -> SampleError:
    where = f"source {document.source}, key {document.key}, image {image_number}"
    return SampleError(error.what, where=where, remedy=error.remedy)
