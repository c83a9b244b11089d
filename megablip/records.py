"""What flows through megablip, from a shard to a micro-batch.

    Document -> EncodedDocument -> PackedSequence -> MicroBatch

A stage of the pipeline takes the record on its left and makes the one on its
right; nothing flows back.  Shapes use T tokens, D documents, N tiles, I images,
V visual tokens, P patches of a tile and S pixels of a tile's side.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:  # torch is imported by the ranks only
    import torch

DIGESTS = 2**63  # a digest is a number below this, and digests add up modulo it: any split into ranks gives one sum
IGNORE_LABEL = -100  # torch's cross entropy ignores this label


@dataclass(frozen=True, slots=True)
class Text:
    """A run of text. `loss` says whether its tokens are trained on.

    `role` says whose words of a conversation they are; segments of one role
    in a row, images between and after them included, are one turn.  An empty
    text opens a turn that begins with an image.
    """

    text: str
    loss: bool = True
    role: Literal["", "system", "user", "assistant"] = ""


@dataclass(frozen=True, slots=True)
class Image:
    """An image as it lies in the shard: undecoded bytes."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Document:
    """An ordered list of segments; what every data set becomes.

    A sample is one document, or a preference pair: two, the chosen and the
    rejected answer to one prompt, which stay in one sequence.
    """

    segments: tuple[Text | Image, ...]
    source: str
    key: str
    preference: Literal["", "chosen", "rejected"] = ""


@dataclass(frozen=True, slots=True)
class VisualLayout:
    """How an image becomes tiles and visual tokens; a property of the model.

    `grids` are (columns, rows) templates for the high-resolution tiles; every
    image also has one base tile (the whole image squashed), which comes first.
    """

    tile_size: int  # pixels
    patch_size: int  # pixels
    tokens_per_tile: int
    grids: tuple[tuple[int, int], ...]
    grid_rule: Literal["released", "paper"] = "released"
    tokens_per_image: int = 0  # on top of those of its tiles

    @property
    def patches_per_side(self) -> int:
        return self.tile_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        return self.patches_per_side**2

    @property
    def tile_bytes(self) -> int:
        """Of a tile's pixels, as uint8."""
        return 3 * self.tile_size**2

    def tiles(self, grid: tuple[int, int]) -> int:
        """Number of tiles of an image of this grid, base tile included."""
        return 1 + grid[0] * grid[1]

    def visual_tokens(self, grid: tuple[int, int]) -> int:
        """Number of visual tokens of an image of this grid."""
        return self.tokens_per_image + self.tiles(grid) * self.tokens_per_tile

    def spans(self, grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64[I] and int64[I]: each image's first visual token among all of theirs, and how many it has.

        Args:
            grids: int[I, 2], (columns, rows) of each image.
        """
        counts = np.array([self.visual_tokens((columns, rows)) for columns, rows in grids.tolist()], np.int64)
        return np.cumsum(counts) - counts, counts


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image of an EncodedDocument: undecoded bytes, its grid, its place.

    Its visual tokens are the `layout.visual_tokens(grid)` ids from `start` on.
    """

    data: bytes
    grid: tuple[int, int]  # (columns, rows)
    start: int


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """A document as token ids: one `<image>` id for each visual token."""

    input_ids: np.ndarray  # int32[n]
    labels: np.ndarray  # int32[n], IGNORE_LABEL where there is no loss
    images: tuple[EncodedImage, ...]
    segment_starts: np.ndarray  # int32[segments], from 0 on: where the document may be cut; an image is a segment
    source: str
    key: str
    preference: Literal["", "chosen", "rejected"] = ""

    @property
    def tiles(self) -> int:
        return sum(1 + image.grid[0] * image.grid[1] for image in self.images)


@dataclass(frozen=True, slots=True)
class SampleAddress:
    """Where a sample lies: numbers, never bytes. Sources are named by index
    into the recipe's list, shards by index into the source's sorted list."""

    source: int
    shard: int
    sample: int


@dataclass(frozen=True, slots=True)
class PlannedDocument:
    """A sample, or a piece of one, that waits to be packed or has been: its address and costs.

    A sample that is cut gives pieces: `tokens` tokens from `start` on. Only a
    sample of one document is ever cut.
    """

    address: SampleAddress
    tokens: int
    tiles: int
    start: int = 0
    last: bool = True  # no further piece of the sample follows


@dataclass(frozen=True, slots=True)
class PlannedSequence:
    """What the planner decides: which documents one sequence holds.

    `lane_state` is the lane's state right after this sequence, an int64
    vector; to resume after it, plan on from there.
    """

    lane: int
    index: int  # the lane's own count of sequences, from 0
    documents: tuple[PlannedDocument, ...]
    lane_state: np.ndarray


@dataclass(frozen=True, slots=True)
class DecodedDocument:
    """An encoded document whose images are pixels."""

    input_ids: np.ndarray  # int32[n]
    labels: np.ndarray  # int32[n]
    visual_positions: np.ndarray  # int32[v], places of the visual tokens
    tiles: np.ndarray  # uint8[tiles, 3, S, S]
    patch_mask: np.ndarray  # bool[tiles, P], False where the patch is padding
    grids: np.ndarray  # int32[images, 2], (columns, rows)
    source: int
    key: str
    preference: Literal["", "chosen", "rejected"] = ""


@dataclass(frozen=True, slots=True)
class Skip:
    """A sample that was not used, and why: a line of quarantine.jsonl."""

    source: str
    shard: str
    key: str  # empty where the shard itself is damaged
    offset: int  # bytes from the start of the shard, -1 if unknown
    error: str


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """Documents laid end to end within the token and tile budgets: T tokens, D documents.

    `skipped` lists samples that could not be used, on the way to this sequence
    or in it: the sequence stays short and nothing else changes.
    """

    lane: int
    index: int
    input_ids: np.ndarray  # int32[T]
    labels: np.ndarray  # int32[T]; none on a document's first token, which nothing before it predicts
    doc_lens: np.ndarray  # int32[D]
    source: np.ndarray  # int32[D], index into the recipe's sources
    pair: np.ndarray  # int32[D]: number of the preference pair in this sequence, -1 if none
    visual_positions: np.ndarray  # int32[V], places in input_ids
    tiles: np.ndarray  # uint8[N, 3, S, S]
    patch_mask: np.ndarray  # bool[N, P]
    grids: np.ndarray  # int32[I, 2]
    keys: tuple[str, ...]
    skipped: tuple[Skip, ...]
    lane_state: np.ndarray

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def digest(self) -> int:
        """63 bits that tell this sequence from others: by its place in the run, its keys and its tokens."""
        place = ascii((self.lane, self.index, self.keys)).encode()
        return int.from_bytes(hashlib.blake2b(place + self.input_ids.tobytes(), digest_size=8).digest()) >> 1


# Lengths and indices are made from these; on a device, the forward would wait to read them.
_ON_HOST = ("patch_mask", "grid", "pair")


@dataclass(slots=True)
class MicroBatch:
    """What one forward takes: T tokens without padding, D documents.

    Labels are aligned with `input_ids` (not shifted): the loss at position i
    predicts `labels[i + 1]`, and never crosses a document.  A micro-batch
    always has a tile: `dummy` is True where it had no image, and then its one
    tile reaches the loss with weight zero.
    """

    input_ids: torch.Tensor  # int64[T]
    labels: torch.Tensor  # int64[T]
    position_ids: torch.Tensor  # int64[T], restart at each document
    cu_seqlens: torch.Tensor  # int32[D+1]
    doc_lens: list[int]  # the same lengths as Python ints, to spare a device sync
    max_seqlen: int
    source: torch.Tensor  # int32[D]
    pair: torch.Tensor  # int32[D]: number of the preference pair, -1 if none; stays on the host
    tiles: torch.Tensor  # uint8[N, 3, S, S]
    patch_mask: torch.Tensor  # bool[N, P]; stays on the host, as `grid`
    tile_to_image: torch.Tensor  # int32[N]
    grid: torch.Tensor  # int32[I, 2]; stays on the host, where it is read
    visual_token_index: torch.Tensor  # int64[V], places in input_ids; none if dummy
    keys: list[str] = field(default_factory=list)
    dummy: bool = False

    def to(self, device: torch.device) -> MicroBatch:
        """The same with its tensors on `device`, but for those that are read on the host."""
        moved = {
            f.name: value.to(device, non_blocking=True) if hasattr(value, "to") and f.name not in _ON_HOST else value
            for f in fields(self)
            for value in [getattr(self, f.name)]
        }
        return MicroBatch(**moved)

    @property
    def valid_labels(self) -> int:
        # The first label of a document has nothing before it to predict it;
        # the packer sets it to IGNORE_LABEL, so this is the loss's normaliser.
        return int((self.labels != IGNORE_LABEL).sum())

    @property
    def pairs(self) -> int:
        """Preference pairs, each of two documents."""
        return int((self.pair >= 0).sum()) // 2


MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class LocalSlice:
    """The flat elements [start, end) of a parameter that a rank owns.

    `tensors` maps MASTER and MOMENTS to fp32 vectors of length end - start.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    end: int
    tensors: dict[str, torch.Tensor]

    def narrow(self, start: int, end: int) -> LocalSlice:
        """The part of it within [start, end), as views."""
        start, end = max(start, self.start), min(end, self.end)
        length = max(end - start, 0)
        tensors = {kind: view.narrow(0, start - self.start, length) for kind, view in self.tensors.items() if length}
        return replace(self, start=start, end=start + length, tensors=tensors)
