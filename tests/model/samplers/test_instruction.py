"""Which words are an image's instruction, and that no others reach its visual tokens."""

import pytest
import torch

from megablip.model.samplers.instruction import MAX_INSTRUCTION_TOKENS, find_instructions
from megablip.records import IGNORE_LABEL
from tests.model.tiny import IMAGE_ID, features_of, pack

from .variants import ASSISTANT, END, INSTRUCTED, USER, chat_doc, variant_model

I = IMAGE_ID  # noqa: E741


def instructions(ids, starts=(0,), user_turn=(USER,)):
    """The words of each image: each run of IMAGE_ID is one."""
    ids = torch.tensor(ids)
    runs = [n for n in range(len(ids)) if ids[n] == I and (n == 0 or ids[n - 1] != I)]
    embeds = torch.arange(len(ids), dtype=torch.float32)[:, None]
    found = find_instructions(
        ids, embeds, torch.tensor(starts), torch.tensor(runs), user_turn=user_turn, end_id=END, image_id=I
    )
    rows = []
    for words, vectors, mask in zip(found.ids, found.embeds, found.mask, strict=True):
        assert words[~mask].eq(0).all()
        assert torch.equal(ids[vectors[mask, 0].long()], words[mask])
        rows.append(words[mask].tolist())
    return rows


@pytest.mark.parametrize(
    ("ids", "starts", "expected"),
    [
        ([1, USER, I, I, 5, 6, END, ASSISTANT, 7, END], (0,), [[5, 6]]),
        ([USER, 5, I, 6, END], (0,), [[5, 6]]),
        # Each image has the words of its own turn; answers belong to none.
        ([USER, I, 5, END, ASSISTANT, 7, END, USER, 8, I, I, END, ASSISTANT, 9, END], (0,), [[5], [8]]),
        ([USER, I, 5, I, 6, END], (0,), [[5, 6], [5, 6]]),
        # Not in a user's turn, or in one that is open, or cut off from what opened it.
        ([1, I, 5, 6, 2], (0,), [[]]),
        ([USER, 5, END, ASSISTANT, I, 7, END], (0,), [[]]),
        ([USER, 5, END, I, 6], (0,), [[]]),
        ([USER, I, 5, 6], (0,), [[]]),
        ([I, 5, END], (0,), [[]]),
        # A document ends a turn.
        ([USER, I, 5, I, 6, END], (0, 3), [[], []]),
        ([USER, I, 5, END, USER, I, 6, END], (0, 4), [[5], [6]]),
        ([USER, USER, I, 5, END], (0,), [[5]]),
        # No words at all.
        ([USER, I, END], (0,), [[]]),
        ([I], (0,), [[]]),
    ],
)
def test_which_words(ids, starts, expected):
    assert instructions(ids, starts) == expected


def test_a_turn_that_opens_with_several_ids():
    """As in ChatML: the first id is that of any turn, the next says whose."""
    turn = (USER, 7)
    assert instructions([1, USER, 7, I, 5, 7, END, USER, 8, 6, I, 9, END], (0,), turn) == [[5, 7], []]
    assert instructions([USER, 7, END, USER, 7, 5, I, I, END, 3, USER, 7, I, END], (0,), turn) == [[5], []]
    assert instructions([USER, 7, I, 5, END], (0, 1), turn) == [[]]  # the next document begins within the opening
    assert instructions([USER, I, 7, 5, END], (0,), turn) == [[]]


def test_long_instructions_are_cut():
    words = [5 + n % 50 for n in range(MAX_INSTRUCTION_TOKENS + 20)]
    assert instructions([USER, I, *words, END]) == [words[:MAX_INSTRUCTION_TOKENS]]


def visual_tokens(model, packed):
    outputs = []
    handle = model.sampler.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(packed=packed, vision_features=features_of(model, packed))
    handle.remove()
    return outputs[0]


@pytest.mark.parametrize("kind", INSTRUCTED)
def test_only_the_words_of_its_turn_reach_an_image(kind):
    """Not one bit changes with an answer, another document, or what surrounds the turn; it does with each word."""
    model = variant_model(kind)
    packed = pack([chat_doc(model, [(2, 1)], 1), chat_doc(model, [], 2), chat_doc(model, [(1, 2)], 3, question=7)])
    before = visual_tokens(model, packed)
    of_image = torch.tensor([0, 0, 0, 1, 1, 1])
    turns = []
    for start, length in zip(packed.cu_seqlens.tolist(), packed.doc_lens, strict=False):
        ids = packed.input_ids[start : start + length].tolist()
        turns.append(range(start + 2, start + ids.index(END)))
    changed_by_words = 0
    for place in range(len(packed.input_ids)):
        old = int(packed.input_ids[place])
        if old >= 80:
            continue
        packed.input_ids[place] = old % 70 + 5
        assert packed.input_ids[place] != old
        after = visual_tokens(model, packed)
        packed.input_ids[place] = old
        for image, document in ((0, 0), (1, 2)):
            tiles = of_image == image
            same = torch.equal(before[tiles], after[tiles])
            assert same is (place not in turns[document]), (place, document)
            changed_by_words += not same
        if packed.labels[place] != IGNORE_LABEL:
            assert torch.equal(before, after)
    assert changed_by_words == 5 + 7
