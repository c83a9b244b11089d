"""How documents lie in a pack, and the indices that attention derives from it.

Built once for each micro-batch and handed to every layer.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(eq=False)
class PackedLayout:
    """Documents laid end to end: T tokens, D documents, none empty.

    Attributes:
        doc_lens: their lengths, D Python ints, so that nothing waits for a device.
        cu_seqlens: int32[D + 1], where each begins, and T; on the tokens' device.
    """

    doc_lens: list[int]
    cu_seqlens: Tensor
    _cache: dict[Hashable, object] = field(default_factory=dict, repr=False)

    @classmethod
    def from_lengths(cls, doc_lens: list[int], device: torch.device | str = "cpu") -> PackedLayout:
        return cls(list(doc_lens), on_device(np.cumsum([0, *doc_lens], dtype=np.int32), device))

    @cached_property
    def max_seqlen(self) -> int:
        return max(self.doc_lens)

    @cached_property
    def is_even(self) -> bool:
        """Whether all documents have one length."""
        return len(set(self.doc_lens)) == 1

    @cached_property
    def document_index(self) -> Tensor:
        """int64[T]: the number of each token's document."""
        device = self.cu_seqlens.device
        lengths = self.cu_seqlens.diff()
        documents = torch.arange(len(self.doc_lens), device=device)
        return documents.repeat_interleave(lengths, output_size=sum(self.doc_lens))

    @cached_property
    def padding(self) -> Padding:
        """How the rows of the documents lie in a padded batch."""
        return Padding.of_lengths(self.doc_lens, self.cu_seqlens.device)

    def short_documents(self, limit: int) -> ShortDocuments:
        """The documents of at most `limit` tokens, in length buckets."""
        key = ("short", limit)
        if key not in self._cache:
            self._cache[key] = ShortDocuments(self.doc_lens, limit, self.cu_seqlens.device)
        return self._cache[key]  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Rows:
    """A choice of rows and the way back.

    Attributes:
        index: int64[taken], the row that each taken one is.
        inverse: int64[rows], the taken row that each is, `taken` for those that aren't.
        all_taken: whether there is none of these.
    """

    index: Tensor
    inverse: Tensor
    all_taken: bool

    def take(self, x: Tensor) -> Tensor:
        """[rows, ...] -> [taken, ...]; of a row that is taken more than once, one has a gradient."""
        return _TakeRows.apply(x, self)


class _TakeRows(torch.autograd.Function):
    """index_select whose backward is one too: adding rows up is slow on the CPU, and in no fixed order on GPUs."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return x.index_select(0, rows.index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if not ctx.rows.all_taken:
            grad = torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])])
        return grad.index_select(0, ctx.rows.inverse), None


@dataclass(frozen=True, slots=True)
class Padding:
    """Documents as a batch, each padded to the longest by copies of its last row.

    Attributes:
        rows: those of [D * longest]; the copies have no gradient, so whoever takes them must not need one.
        mask: bool[D, longest], False at the copies.
    """

    rows: Rows
    mask: Tensor

    @classmethod
    def of_lengths(cls, lengths: list[int], device: torch.device) -> Padding:
        ends = np.cumsum(lengths)
        place = np.arange(max(lengths))
        mask = place < np.array(lengths)[:, None]
        index = np.minimum((ends - lengths)[:, None] + place, ends[:, None] - 1)
        rows = Rows(on_device(index.ravel(), device), on_device(np.flatnonzero(mask), device), all_taken=True)
        return cls(rows, on_device(mask, device))


@dataclass(frozen=True, slots=True)
class VisibleKeys:
    """A batch of N rows with Q queries each, which see some of the row's K keys.

    Attributes:
        queries, keys: N documents each.
        rows: of [N * K], those that are seen; None where all are.
    """

    queries: PackedLayout
    keys: PackedLayout
    rows: Rows | None

    @classmethod
    def from_mask(cls, seen: np.ndarray, queries: int, device: torch.device) -> VisibleKeys:
        """From bool[N, K], on the host, so that nothing waits for the device."""
        counts = seen.sum(axis=1).tolist()
        rows = None
        if not seen.all():
            inverse = np.where(seen.ravel(), seen.ravel().cumsum() - 1, seen.sum())
            rows = Rows(on_device(np.flatnonzero(seen), device), on_device(inverse, device), all_taken=False)
        from_lengths = PackedLayout.from_lengths
        return cls(from_lengths([queries] * len(counts), device), from_lengths(counts, device), rows)

    def take(self, keys: Tensor) -> Tensor:
        """[N, K, d] -> [T_k, d], the keys that are seen."""
        return keys.flatten(0, 1) if self.rows is None else self.rows.take(keys.flatten(0, 1))


def on_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """As a tensor there. Nothing waits: a copy from memory that is not pinned would, for all that the GPU has to do."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Bucket:
    """`count` documents, each padded to `length` tokens, from padded token `start` on."""

    start: int
    count: int
    length: int

    def view(self, rows: Tensor, heads: int, batch_heads: int) -> Tensor:
        """This bucket's part of padded rows, for one product per document and key-value head.

        Args:
            rows: [padded tokens * heads, D], in the order bucket, document, head, token.
            batch_heads: key-value heads; the query heads that share one are laid end to end.

        Returns:
            [count * batch_heads, heads / batch_heads * length, D], a view.
        """
        part = rows[self.start * heads : (self.start + self.count * self.length) * heads]
        return part.view(self.count * batch_heads, -1, rows.shape[-1])


class ShortDocuments:
    """Where the tokens of short documents go in padded batches, and back.

    Lengths are rounded up to multiples of 32 (one AVX-512 vector of bf16): a
    bucket for each of these wastes little and leaves few, large products.

    Attributes:
        documents: numbers of the documents, ascending; the index tensors count
            only their tokens.
        buckets: the padded batches.
    """

    _ROUND = 32

    def __init__(self, doc_lens: list[int], limit: int, device: torch.device):
        self.documents = [number for number, length in enumerate(doc_lens) if length <= limit]
        self._device = device
        self._cache: dict[Hashable, Tensor] = {}
        lengths = np.array([doc_lens[number] for number in self.documents], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        rounded = -(-lengths // self._ROUND) * self._ROUND
        self._tokens = int(lengths.sum())
        self.buckets: list[Bucket] = []
        # For each padded token its token, self._tokens for padding; laid out as [documents, length] per bucket.
        self._sources: list[np.ndarray] = []
        padded = 0
        for length in np.unique(rounded).tolist():
            members = np.nonzero(rounded == length)[0]
            position = np.arange(length)
            source = np.where(position < lengths[members, None], starts[members, None] + position, self._tokens)
            self.buckets.append(Bucket(padded, len(members), length))
            self._sources.append(source)
            padded += source.size

    def pad_index(self, heads: int, extra_row: bool = False) -> Tensor:
        """int64[padded tokens * heads]: which row of [heads * T, D] each padded row takes.

        Padding takes the last row, or with `extra_row` the one after it.
        """
        return self._cached(("pad", heads, extra_row), lambda: self._pad_index(heads, extra_row))

    def unpad_index(self, heads: int) -> Tensor:
        """int64[heads * T]: the padded row that each row of [heads * T, D] comes from."""
        return self._cached(("unpad", heads), lambda: self._unpad_index(heads))

    def causal_bias(self, length: int, groups: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """[groups * length, length]: 0 where a query sees a key, -inf elsewhere."""
        return self._cached(
            ("bias", length, groups, window, dtype), lambda: self._causal_bias(length, groups, window, dtype)
        )

    def _pad_index(self, heads: int, extra_row: bool) -> np.ndarray:
        index = np.concatenate([self._head_major(source, heads) for source in self._sources])
        return index if extra_row else np.minimum(index, heads * self._tokens - 1)

    def _head_major(self, source: np.ndarray, heads: int) -> np.ndarray:
        """Rows of one bucket in the order document, head, token."""
        rows = np.arange(heads)[:, None] * self._tokens + source[:, None, :]
        return np.where(source[:, None, :] == self._tokens, heads * self._tokens, rows).ravel()

    def _unpad_index(self, heads: int) -> np.ndarray:
        padded = self._pad_index(heads, extra_row=True)
        index = np.empty(heads * self._tokens + 1, dtype=np.int64)
        index[padded] = np.arange(len(padded))
        return index[:-1]

    def _causal_bias(self, length: int, groups: int, window: int | None, dtype: torch.dtype) -> Tensor:
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        return torch.zeros(length, length).masked_fill_(~seen, float("-inf")).repeat(groups, 1).to(dtype)

    def _cached(self, key: Hashable, build) -> Tensor:
        if key not in self._cache:
            self._cache[key] = torch.as_tensor(build()).to(self._device)
        return self._cache[key]
