"""From a Document to token ids and labels, and on to pixels.

    bos  text  <image> * n  caption  <|endofchunk|>  <image> * n  caption  <|endofchunk|>  eos

Each visual token has an `<image>` id of its own, so lengths and positions are
explicit.  A chunk is an image (or several in a row) and the text that follows;
`<|endofchunk|>` ends it, as in OpenFlamingo, and a model that writes captions
learns there to stop.

A document whose texts have roles is a conversation, in the tokenizer's chat
format; Phi-3's is

    bos  <|user|> \\n  <image> * n  question  <|end|> \\n  <|assistant|> \\n  answer  <|end|> \\n

Here the model learns to stop at `<|end|>`, and there is neither `<|endofchunk|>`
nor eos.  Ids and labels are made together, turn by turn, and each text is
tokenized alone, so no token is half trained on.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np

from megablip.chat import ChatFormat, chat_format
from megablip.data.images import choose_grid, empty_tiles, image_size, make_tiles
from megablip.errors import ConfigError, PackingError, SampleError
from megablip.records import (
    IGNORE_LABEL,
    DecodedDocument,
    Document,
    EncodedDocument,
    EncodedImage,
    Text,
    VisualLayout,
)
from megablip.tokens import CHAT_TOKENS, Tokenizer


class Encoder:
    """Documents to ids, for one tokenizer folder and one visual layout.

    Args:
        dct_scaling: see images.make_tiles.

    Raises:
        ConfigError: the tokenizer can't be read or lacks a special token.
    """

    def __init__(self, tokenizer_path: str, layout: VisualLayout, dct_scaling: bool = False):
        self.tokenizer = Tokenizer(tokenizer_path)
        self.layout = layout
        self._dct_scaling = dct_scaling
        self._chat = chat_format(self.tokenizer, Path(tokenizer_path))

    def require_chat(self) -> ChatFormat:
        """Raises ConfigError unless the tokenizer has a chat format."""
        if self._chat is None:
            raise ConfigError(
                "the tokenizer has no chat format, which a source needs",
                where="data.sources",
                remedy=f"give it a chat template, or add {', '.join(CHAT_TOKENS.values())} as special tokens, or leave "
                "out the conversations",
            )
        return self._chat

    def encode(self, document: Document) -> EncodedDocument:
        """Ids, labels and image positions; of images only the headers are read.

        Trained: text whose segment says so, the `<|endofchunk|>` or `<|end|>` that
        closes it, and eos.  (xGen-MM's released code masks `<|endofchunk|>`, with a
        note that its authors would rather not: few-shot captions stop by it.)
        Never trained: bos, `<image>`, and what opens a turn.

        Segments start where a document may be cut: bos and what opens a turn
        belong to the segment that follows, all other control tokens to the one
        before.

        Raises:
            SampleError: an image's header can't be read.
            ConfigError: a conversation, but the tokenizer has no tokens for it.
        """
        return self._row(document).finish()

    def encode_prompt(self, document: Document) -> EncodedDocument:
        """As `encode`, but left open: for a model to go on with.

        After a conversation stands what opens the assistant's turn, after any
        other document neither `<|endofchunk|>` nor eos.

        Raises:
            SampleError, ConfigError: as `encode`.
        """
        return self._row(document, is_open=True).finish()

    def measure(self, document: Document) -> tuple[int, int]:
        """(tokens, tiles) that `encode` would give, in less time.

        Raises:
            SampleError, ConfigError: as `encode`.
        """
        row = self._row(document)
        return len(row.ids), sum(self.layout.tiles(image.grid) for image in row.images)

    def decode(self, encoded: EncodedDocument, source_index: int, out: np.ndarray | None = None) -> DecodedDocument:
        """Cut the document's images into tiles.

        Args:
            out: uint8[tiles, 3, S, S] to write the tiles to; None makes a new array.

        Raises:
            SampleError: an image is broken.
        """
        if out is None:
            out = empty_tiles(encoded.tiles, self.layout.tile_size)
        return self.with_pixels(encoded, source_index, out, self.cut_images(encoded, out))

    def cut_images(self, encoded: EncodedDocument, out: np.ndarray) -> list[np.ndarray]:
        """The part of `decode` that takes long: writes the tiles, and gives the patch mask of each image.

        Raises:
            SampleError: an image is broken.
        """
        masks, first = [], 0  # tile of the image
        for number, image in enumerate(encoded.images):
            end = first + self.layout.tiles(image.grid)
            try:
                _, mask = make_tiles(
                    image.data, image.grid, self.layout, out=out[first:end], dct_scaling=self._dct_scaling
                )
            except SampleError as error:
                raise _located(error, encoded, number) from None
            masks.append(mask)
            first = end
        return masks

    def with_pixels(
        self, encoded: EncodedDocument, source_index: int, tiles: np.ndarray, masks: list[np.ndarray]
    ) -> DecodedDocument:
        """The rest of `decode`: the document with its tiles and with the masks of its images."""
        slots = [np.arange(i.start, i.start + self.layout.visual_tokens(i.grid)) for i in encoded.images]
        return DecodedDocument(
            input_ids=encoded.input_ids,
            labels=encoded.labels,
            visual_positions=np.concatenate([np.zeros(0, np.int32), *slots], dtype=np.int32),
            tiles=tiles,
            patch_mask=np.concatenate([np.zeros((0, self.layout.patches_per_tile), bool), *masks]),
            grids=np.array([image.grid for image in encoded.images], dtype=np.int32).reshape(-1, 2),
            source=source_index,
            key=encoded.key,
            preference=encoded.preference,
        )

    def _row(self, document: Document, is_open: bool = False) -> _Row:
        row = _Row(document)
        if self.tokenizer.bos_id is not None:
            row.prefix([self.tokenizer.bos_id])
        if any(isinstance(segment, Text) and segment.role for segment in document.segments):
            self._encode_turns(document, row)
            if is_open:
                row.prefix(list(self.require_chat().opening["assistant"]))
        else:
            self._encode_chunks(document, row, is_open)
        return row

    def _encode_chunks(self, document: Document, row: _Row, is_open: bool) -> None:
        previous: Text | None = None  # the text that the next image, or the end, would close

        def close_chunk() -> None:
            if row.images and previous is not None:
                row.suffix([self.tokenizer.end_of_chunk_id], previous.loss)

        for segment in document.segments:
            if isinstance(segment, Text):
                row.segment(self.tokenizer.encode(segment.text), segment.loss)
                previous = segment
            else:
                close_chunk()
                previous = None
                self._encode_image(segment.data, row)
        if not is_open:
            close_chunk()
            row.suffix([self.tokenizer.eos_id], loss=True)

    def _encode_turns(self, document: Document, row: _Row) -> None:
        chat = self.require_chat()
        role, trained = "", False  # of the open turn

        def close_turn() -> None:
            if role:
                row.suffix(list(chat.closing[role][: chat.end_of_turn]), trained)
                row.suffix(list(chat.closing[role][chat.end_of_turn :]), loss=False)

        for segment in document.segments:
            if isinstance(segment, Text):
                if segment.role != role:
                    close_turn()
                    if segment.role not in chat.opening:
                        raise SampleError(
                            f"the chat format has no turn of the {segment.role}",
                            where=f"source {document.source}, key {document.key}",
                        )
                    if not role and segment.role != "system":
                        row.prefix(list(chat.preamble))
                    role, trained = segment.role, False
                    row.prefix(list(chat.opening[role]))
                trained = trained or segment.loss
                row.segment(self.tokenizer.encode(segment.text), segment.loss)
            else:
                self._encode_image(segment.data, row)
        close_turn()

    def _encode_image(self, data: bytes, row: _Row) -> None:
        try:
            grid = choose_grid(image_size(data), self.layout)
        except SampleError as error:
            raise _located(error, row.document, len(row.images)) from None
        slots = self.layout.visual_tokens(grid)
        row.segment([self.tokenizer.image_id] * slots, loss=False)
        row.images.append(EncodedImage(data, grid, start=len(row.ids) - slots))


class _Row:
    """The ids of a document while they are laid down."""

    def __init__(self, document: Document):
        self.document = document
        self.ids: list[int] = []
        self.images: list[EncodedImage] = []
        self._labels: list[int] = []
        self._starts: list[int] = []
        self._prefix = 0  # where what belongs to the next segment begins

    def prefix(self, ids: list[int]) -> None:
        """Untrained tokens of the next segment."""
        self.ids += ids
        self._labels += [IGNORE_LABEL] * len(ids)

    def segment(self, ids: list[int], loss: bool) -> None:
        """A new segment; nothing where the text is empty."""
        if ids:
            self._starts.append(self._prefix)
            self.suffix(ids, loss)

    def suffix(self, ids: list[int], loss: bool) -> None:
        """Tokens of the segment before."""
        self.ids += ids
        self._labels += ids if loss else [IGNORE_LABEL] * len(ids)
        self._prefix = len(self.ids)

    def finish(self) -> EncodedDocument:
        return EncodedDocument(
            _int32(self.ids),
            _int32(self._labels),
            tuple(self.images),
            np.array([0, *self._starts[1:]], np.int32),
            self.document.source,
            self.document.key,
            self.document.preference,
        )


def _int32(numbers: list[int]) -> np.ndarray:
    """np.array(numbers, np.int32), several times faster."""
    return np.frombuffer(array("i", numbers), np.int32)


def segments_of(encoded: EncodedDocument) -> list[tuple[int, int]]:
    """(tokens, tiles) of each segment; one with tiles can't be cut."""
    starts = encoded.segment_starts
    tiles = np.zeros(len(starts), np.int64)
    for image in encoded.images:
        tiles[np.searchsorted(starts, image.start, side="right") - 1] += 1 + image.grid[0] * image.grid[1]
    return list(zip(np.diff(starts, append=len(encoded.input_ids)).tolist(), tiles.tolist(), strict=True))


def cut_piece(encoded: EncodedDocument, start: int, tokens: int) -> EncodedDocument:
    """The `tokens` tokens from `start` on, as a document.

    Raises:
        PackingError: the piece is empty, ends past the document, or has a part of a segment with an image.
    """
    end, starts = start + tokens, encoded.segment_starts
    if not 0 <= start < end <= len(encoded.input_ids):
        raise _wrong_cut(encoded, start, end, f"the document has {len(encoded.input_ids)} tokens")
    edges = [*starts.tolist(), len(encoded.input_ids)]
    for image in encoded.images:
        segment = int(np.searchsorted(starts, image.start, side="right")) - 1
        if any(edges[segment] < cut < edges[segment + 1] for cut in (start, end)):
            raise _wrong_cut(encoded, start, end, f"tokens {edges[segment]} to {edges[segment + 1]} are an image")
    return replace(
        encoded,
        input_ids=encoded.input_ids[start:end],
        labels=encoded.labels[start:end],
        images=tuple(
            replace(image, start=image.start - start) for image in encoded.images if start <= image.start < end
        ),
        segment_starts=np.array([0, *(starts[(starts > start) & (starts < end)] - start)], np.int32),
    )


def _wrong_cut(encoded: EncodedDocument, start: int, end: int, why: str) -> PackingError:
    return PackingError(
        f"a document can't be cut to tokens {start} to {end}: {why}",
        where=f"source {encoded.source}, key {encoded.key}",
        remedy="the shard or the tokenizer changed since it was planned: undo that, or start a new run",
    )


def _located(error: SampleError, document: Document | EncodedDocument, image_number: int) -> SampleError:
    where = f"source {document.source}, key {document.key}, image {image_number}"
    return SampleError(error.what, where=where, remedy=error.remedy)
