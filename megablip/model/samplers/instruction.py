"""Which words an image is asked about.

The instruction of an image is the text of the user turn that it stands in:

    <|user|> \\n <image>... What is this? <|end|> \\n <|assistant|> \\n A cat. <|end|>
             ^^             ^^^^^^^^^^^^^

An image outside a user turn has none, nor does one in a turn that is not closed.
So it is told from the ids alone, in training as in generation, and neither an
answer, nor another turn, nor another document is ever part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_INSTRUCTION_TOKENS = 128
"""Tokens of an instruction that are read, the first ones; as InstructBLIP (arXiv 2305.06500)."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """The words that each image is asked about: I images, L tokens at most, at least one.

    Attributes:
        ids: int64[I, L]; 0 past an instruction's end.
        embeds: [I, L, d], the decoder's input embeddings of the ids; anything past the end.
        mask: bool[I, L], True where there is a token.
    """

    ids: Tensor
    embeds: Tensor
    mask: Tensor


def find_instructions(
    input_ids: Tensor,
    embeds: Tensor,
    starts: Tensor,
    images: Tensor,
    *,
    user_turn: Sequence[int],
    end_id: int,
    image_id: int,
) -> Instruction:
    """The instruction of each image.  Waits for the device.

    Args:
        input_ids: int64[T], documents end to end.
        embeds: [T, d], of these ids.
        starts: int64[D], where documents begin.
        images: int64[I], the place of each image's first visual token.
        user_turn: the ids that a user's turn begins with.
        end_id: the id that ends it.
        image_id: the id of visual tokens.
    """
    closes = input_ids == end_id
    opens = torch.ones_like(closes)
    for number, token in enumerate(user_turn):
        opens &= F.pad(input_ids[number:] == token, (0, number))
    first = opens.clone()
    first[1:] |= closes[:-1]
    first[starts] = True
    turn = first.cumsum(0) - 1  # of each token
    begins = first.nonzero().squeeze(1)
    ends = F.pad(begins[1:], (0, 1), value=len(input_ids)) - 1
    of_user = opens[begins] & closes[ends]
    within = torch.arange(len(input_ids), device=input_ids.device) - begins[turn]
    words = of_user[turn] & (within >= len(user_turn)) & ~closes & (input_ids != image_id)
    places = words.nonzero().squeeze(1)
    counts = torch.zeros_like(begins).index_add_(0, turn[places], torch.ones_like(places))
    before = counts.cumsum(0) - counts  # of each turn, in `places`

    image_turn = turn[images]
    length = int(counts[image_turn].amax().clamp(1, MAX_INSTRUCTION_TOKENS))
    column = torch.arange(length, device=input_ids.device)
    mask = column < counts[image_turn, None]
    rows = F.pad(places, (0, 1))[torch.where(mask, before[image_turn, None] + column, 0)]
    return Instruction(torch.where(mask, input_ids[rows], 0), embeds[rows], mask)
