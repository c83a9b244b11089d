import json

import pytest
from typer.testing import CliRunner

from megablip.config import SourceConfig
from megablip.data.schemas import SCHEMAS
from megablip.data.shards import ShardSource, expand_shards
from megablip.errors import SampleError
from megablip.records import Image, Text
from tests.data.small import image
from tools.post_training_shards import app, best_and_worst, mean_rating


def ratings(*values):
    return {f"aspect {number}": {"Rating": value} for number, value in enumerate(values)}


def row(*answers, image="a.png"):
    return {
        "prompt": "what?",
        "img_path": image,
        "completions": {
            "response": [text for text, _ in answers],
            "annotations": [ratings(*values) for _, values in answers],
        },
    }


def test_ratings_that_are_no_numbers_are_left_out():
    assert mean_rating(ratings("4", "N/A", "2", "nan")) == 3
    assert mean_rating(ratings("N/A")) is None
    assert mean_rating({"Helpfulness": {}}) is None
    assert mean_rating(None) is None


def test_the_best_and_the_worst():
    found = best_and_worst(row(("good", "55"), ("bad", "12"), ("middle", "43"), ("unrated", "x")))
    assert found == ("good", "bad")


@pytest.mark.parametrize(
    "answers",
    [
        [("a", "4"), ("b", "4")],
        [("a", "x"), ("b", "x")],
        [("a", "5")],
        [("a", "5"), ("a", "1")],
        [("a", "5"), (" a\n", "1")],
        [],
    ],
)
def test_no_preference(answers):
    assert best_and_worst(row(*answers)) is None


def test_answers_may_be_a_list_of_objects():
    completions = [{"response": "good", "annotations": ratings(5)}, {"response": "bad", "annotations": ratings(1)}]
    assert best_and_worst({"completions": completions}) == ("good", "bad")


@pytest.mark.parametrize("completions", [None, {"response": ["a"]}, {"response": ["a"], "annotations": []}])
def test_another_layout_is_named(completions):
    with pytest.raises(SampleError):
        best_and_worst({"completions": completions})


def samples(folder):
    source = ShardSource("s", expand_shards(f"{folder}/*.tar"))
    return [source.read(shard, n) for shard, count in enumerate(source.counts) for n in range(count)]


def run(tmp_path, verb, rows, *more):
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "images" / "a.png").write_bytes(image().data)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    named = ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    return CliRunner().invoke(app, [verb, str(tmp_path / "rows.json"), *named, *more])


def test_vlfeedback_to_pairs_that_the_trainer_reads(tmp_path):
    rows = [row(("good", "5"), ("bad", "1")), row(("a", "4"), ("b", "4")), row(("worse", "2"), ("better", "3"))]
    assert run(tmp_path, "vlfeedback", rows).output.endswith("2 pairs, 1 without a preference\n")
    config = SourceConfig(name="s", shards="x", schema="preference", weight=1)
    texts = []
    for key, members in samples(tmp_path / "out"):
        chosen, rejected = SCHEMAS["preference"](members, config, key)
        texts.append((chosen.segments[-1].text, rejected.segments[-1].text))
    assert texts == [("good", "bad"), ("better", "worse")]


def test_vlguard_to_exchanges_that_the_trainer_reads(tmp_path):
    rows = [
        {"id": "1", "image": "a.png", "safe": False, "instr-resp": [{"instruction": "do it", "response": "no"}]},
        {
            "id": "2",
            "image": "a.png",
            "safe": True,
            "instr-resp": [
                {"safe_instruction": "describe", "response": "a square"},
                {"unsafe_instruction": "harm", "response": "no"},
            ],
        },
    ]
    assert "1 exchanges on harmful images, 2 exchanges on safe images" in run(tmp_path, "vlguard", rows).output
    config = SourceConfig(name="s", shards="x", schema="safety", weight=1)
    answers = [
        SCHEMAS["safety"](members, config, key)[0].segments[-1].text for key, members in samples(tmp_path / "out")
    ]
    assert answers == ["no", "a square", "no"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(("a", "5"), ("b", "1"), image="../rows.json")], "outside the folder"),
        ([row(("a", "5"), ("b", "1"), image="none.png")], "can't be read"),
        ([{"completions": 3}], 'no "completions"'),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(tmp_path, rows, words):
    found = run(tmp_path, "vlfeedback", rows)
    assert found.exit_code == 1
    assert words in found.output
    assert not (tmp_path / "out").exists()


def turns(question, answer="one", roles=("human", "gpt"), fields=("from", "value")):
    return [dict(zip(fields, turn, strict=True)) for turn in zip(roles, (question, answer), strict=True)]


def read_conversations(folder):
    """(texts, number of images) by key."""
    config = SourceConfig(name="s", shards="x", schema="conversation", weight=1)
    found = {}
    for key, members in samples(folder):
        (document,) = SCHEMAS["conversation"](members, config, key)
        texts = [segment.text for segment in document.segments if isinstance(segment, Text) and segment.text]
        found[key] = texts, sum(isinstance(segment, Image) for segment in document.segments)
    return found


def test_llava_and_mantis_rows_to_conversations_that_the_trainer_reads(tmp_path):
    mantis = turns("<image> or <image>?", roles=("user", "assistant"), fields=("role", "content"))
    rows = [
        {"id": "x", "image": "a.png", "conversations": turns("<image>\nwhat?")},
        {"id": "y", "conversations": turns("how many?", "two\u2028lines")},
        {"id": "z", "images": [{"bytes": None, "path": "a.png"}, "./sub/../a.png"], "conversation": mantis},
    ]
    found = run(tmp_path, "conversations", rows)
    assert found.output.endswith("out: 3 conversations, 3 images\n")
    expected = {
        "rows_0000000": (["\nwhat?", "one"], 1),
        "rows_0000001": (["how many?", "two\u2028lines"], 0),
        "rows_0000002": ([" or ", "?", "one"], 2),
    }
    assert read_conversations(tmp_path / "out") == expected
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    arguments = ["conversations", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "lines")]
    without = CliRunner().invoke(app, arguments)
    assert "row 0 names an image" in without.output
    assert without.exit_code == 1
    CliRunner().invoke(app, [*arguments, "--images", str(tmp_path / "images")])
    assert read_conversations(tmp_path / "lines") == expected


def test_rows_that_cannot_be_used_are_counted_and_told(tmp_path):
    rows = [
        {"image": "none.png", "conversations": turns("<image>what?")},
        {"image": "../rows.json", "conversations": turns("<image>what?")},
        {"image": "a.png", "conversations": turns("<image><image>")},
        {"conversations": turns("what?", roles=("human", "human"))},
        {"image": 3, "conversations": turns("<image>what?")},
        {"image": "a\0.png", "conversations": turns("<image>what?")},
        "no row",
        {"image": "a.png", "conversations": turns("what?")},
    ]
    found = run(tmp_path, "conversations", rows)
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert counts == {
        "left out: an image is missing": 4,
        "left out: not a conversation as training reads it": 3,
        "conversations": 1,
        "images": 1,
    }
    assert list(read_conversations(tmp_path / "out")) == ["rows_0000007"]
    for words in ("row 0: the image 'none.png' can't be read", "row 1: '../rows.json' is outside", "row 2: 2 <image>"):
        assert words in found.stderr
    nothing = run(tmp_path, "conversations", rows[:2])
    assert nothing.exit_code == 1
    assert "there is no sample to write" in nothing.output
    assert json.loads((tmp_path / "out" / "counts.json").read_text()) == counts, "what was there stays"


def test_a_draw_is_without_repeats_and_of_rows_that_can_be_used(tmp_path):
    good = [{"conversations": turns(f"question {number}")} for number in range(20)]
    bad = [{"image": "none.png", "conversations": turns("<image>")}] * 20
    draws = {}
    for seed in ("0", "0", "1"):
        found = run(tmp_path, "conversations", good + bad, "--sample", "12", "--seed", seed)
        assert "12 conversations" in found.output
        keys = list(read_conversations(tmp_path / "out"))
        assert len(keys) == 12
        assert all(key < "rows_0000020" for key in keys)
        assert draws.setdefault(seed, keys) == keys
    assert draws["0"] != draws["1"]
    for number, words in ("21", "only 20 of 21 can be used"), ("41", "41 of 40 can't be drawn without repeats"):
        found = run(tmp_path, "conversations", good + bad, "--sample", number)
        assert found.exit_code == 1
        assert words in found.output


def test_a_sample_of_shards(tmp_path):
    rows = [{"image": "a.png", "conversations": turns(f"<image> {number}")} for number in range(9)]
    run(tmp_path, "conversations", rows)
    (tmp_path / "out").rename(tmp_path / "first")
    run(tmp_path, "conversations", rows)
    specs = [str(tmp_path / "first"), str(tmp_path / "out")]

    def draw(count, seed="0"):
        options = ["--count", count, "--out", str(tmp_path / "drawn"), "--seed", seed]
        return CliRunner().invoke(app, ["sample", *specs, *options])

    assert draw("18").output.endswith("drawn: 18 samples\n")
    found = read_conversations(tmp_path / "drawn")
    assert sorted(texts[0] for texts, images in found.values() if images) == sorted(
        f" {n}" for n in range(9) for _ in "ab"
    )
    assert draw("5").exit_code == 0
    five = read_conversations(tmp_path / "drawn")
    assert five.items() < found.items()
    assert len(five) == 5
    draw("5", "1")
    assert read_conversations(tmp_path / "drawn") != five
    assert "19 of 18 can't be drawn" in draw("19").output
