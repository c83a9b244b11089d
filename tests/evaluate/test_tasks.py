"""What is asked of each schema, and that a batch of mixed prompts is answered as each one alone."""

import json

import pytest
import torch

from megablip.errors import ConfigError, SampleError
from megablip.evaluate.generation import Answerer, Decoding, batches_of
from megablip.evaluate.tasks import Answer, ask, conversation_questions, right_characters, shots_questions
from megablip.records import Document, Image, Text
from tests.data.builders import write_tar
from tests.evaluate.test_evaluation import png
from tests.small_export import make_export


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    found = Answerer(make_export(tmp_path_factory.mktemp("export"), chat=True))
    torch.manual_seed(1)
    for parameter in found.model.decoder.parameters():  # far from uniform predictions, so that mistakes show
        parameter.data.normal_(0, 0.5)
    return found


def turns(*texts):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def test_a_conversation_is_asked_up_to_its_last_answer(tmp_path):
    content = {"conversations": turns("<image> a", "b", "c", " d "), "task": "letters"}
    write_tar(tmp_path / "a.tar", [{"png": png(), "json": json.dumps(content).encode()}])
    (question,) = conversation_questions(str(tmp_path / "a.tar"), None)
    assert [type(s) for s in question.prompt.segments] == [Text, Image, Text, Text, Text]
    assert question.prompt.segments[-1] == Text("c", loss=False, role="user")
    assert (question.truth, question.facts, question.image) == ("d", {"task": "letters"}, png())
    write_tar(tmp_path / "b.tar", [{"json": json.dumps({"conversations": turns("a", "b", "c")}).encode()}])
    with pytest.raises(SampleError, match="last turn is not the assistant's"):
        conversation_questions(str(tmp_path / "b.tar"), None)


def test_shots_are_the_first_pairs_and_the_last_image_is_asked(tmp_path):
    content = {"images": ["0.png", None, "1.png", None, "2.png", None], "texts": [None, "a", None, "b", None, "c"]}
    members = {f"{n}.png": png((n, n, n)) for n in range(3)}
    write_tar(tmp_path / "a.tar", [members | {"json": json.dumps(content).encode()}])
    (none,), (two,) = (shots_questions(str(tmp_path / "a.tar"), None, shots) for shots in (0, 2))
    assert [type(s) for s in none.prompt.segments] == [Image]
    assert none.prompt.segments[0].data == two.prompt.segments[-1].data == png((2, 2, 2))
    assert [s.text for s in two.prompt.segments if isinstance(s, Text)] == ["a", "b"]
    assert none.truth == two.truth == "c"
    with pytest.raises(SampleError, match="not 4 pairs"):
        shots_questions(str(tmp_path / "a.tar"), None, 3)


def test_mixed_prompts_in_one_batch_are_answered_as_each_alone(answerer):
    user = {"loss": False, "role": "user"}
    prompts = [
        Document((Text("one two", **user),), "s", "0"),
        Document((Text("", **user), Image(png()), Text("three", **user)), "s", "1"),
        Document((Text("a", **user), *[Image(png((n, 9, 9))) for n in range(3)], Text("four", **user)), "s", "2"),
    ]
    ends = [answerer.encoder.tokenizer.eos_id]
    decoding = Decoding(max_new_tokens=12)
    together = answerer.answer(prompts, decoding, ends)
    assert together == [answerer.answer([prompt], decoding, ends)[0] for prompt in prompts]
    assert len(set(together)) == 3


def test_an_answer_ends_at_its_end(answerer):
    prompt = Document((Text("one two", loss=False, role="user"),), "s", "0")
    encoder = answerer.encoder
    inputs = encoder.encode_prompt(prompt).input_ids.astype("int64")
    first = int(answerer.model(torch.from_numpy(inputs)[None]).logits[0, -1].argmax())
    assert answerer.answer([prompt], Decoding(max_new_tokens=5), [first]) == [""]


def test_drawn_answers_differ_and_a_seed_repeats_them(answerer):
    prompt = Document((Text("one two", loss=False, role="user"),), "s", "0")
    drawn = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        drawn.append(answerer.answer([prompt] * 4, Decoding(max_new_tokens=8, temperature=3.0), [2]))
    assert drawn[0] == drawn[2] != drawn[1]
    assert len(set(drawn[0])) > 1


def test_batches_are_of_like_length():
    assert batches_of([3, 10, 9, 1], batch_tokens=20) == [[1, 2], [0, 3]]
    assert batches_of([50], batch_tokens=20) == [[0]]
    assert batches_of([], batch_tokens=20) == []


def test_refusals_and_characters():
    assert Answer("k", "", "I cannot help with that").refused
    assert not Answer("k", "", "3 8 1").refused
    assert right_characters([Answer("k", "123", "193"), Answer("k", "12", "")]) == pytest.approx((2 / 3 + 0) / 2)


def test_a_tokenizer_without_chat_is_named(tmp_path):
    found = Answerer(make_export(tmp_path))
    write_tar(tmp_path / "a.tar", [{"json": json.dumps({"conversations": turns("a", "b")}).encode()}])
    questions = conversation_questions(str(tmp_path / "a.tar"), None)
    with pytest.raises(ConfigError, match="no chat format"):
        ask(found, questions, "turn", Decoding(), "t")
