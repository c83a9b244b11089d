"""What each on-disk layout becomes; regions.py's captions are tested in test_regions.py."""

import base64
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megablip.config import CHAT_SCHEMAS, SourceConfig
from megablip.data import members as members_module
from megablip.data.schemas import SCHEMAS
from megablip.errors import SampleError
from megablip.records import Image, Text


def source(schema, **options):
    return SourceConfig(name="web", shards="", schema=schema, weight=1, **options)


def read_all(schema, **members):
    members = {name.replace("_", "."): value for name, value in members.items()}
    if not isinstance(members.get("json", b""), bytes):
        members["json"] = json.dumps(members["json"]).encode()
    return SCHEMAS[schema](members, source(schema), "000010005")


def read(schema, **members):
    (document,) = read_all(schema, **members)
    return document


def system(text):
    return Text(text, loss=False, role="system")


def user(text):
    return Text(text, loss=False, role="user")


def assistant(text):
    return Text(text, loss=True, role="assistant")


A, B, C = Image(b"A"), Image(b"B"), Image(b"C")


def test_every_schema_of_the_recipe_is_here():
    assert set(SourceConfig.model_fields["schema_name"].annotation.__args__) == set(SCHEMAS)
    assert set(SCHEMAS) > CHAT_SCHEMAS


def test_caption_from_txt_or_json():
    document = read("caption", jpg=b"\xff", txt=b" a dog\n")
    assert document.segments == (Image(b"\xff"), Text("a dog"))
    assert (document.source, document.key) == ("web", "000010005")
    assert read("caption", webp=b"\xff", json={"caption": "a dog"}).segments == document.segments
    assert read("caption", png=b"\xff", txt=b"a dog", json={"caption": "other"}).segments == document.segments


def test_text_from_txt_or_json():
    assert read("text", txt="été".encode()).segments == (Text("été"),)
    assert read("text", json={"text": "été"}).segments == (Text("été"),)


@pytest.mark.parametrize("name", ["jpg", "0.png", "photo.WEBP", "x.y.tiff"])
def test_names_of_images(name):
    members = {name: b"A", "txt": b"a dog"}
    if name == "photo.WEBP":
        with pytest.raises(SampleError, match="one image expected"):
            SCHEMAS["caption"](members, source("caption"), "0")
    else:
        assert SCHEMAS["caption"](members, source("caption"), "0")[0].segments == (A, Text("a dog"))


def test_interleaved_slots_in_order():
    document = read(
        "interleaved",
        **{"0.png": b"A", "1.jpg": b"B"},
        json={"texts": [None, "one", None, None, "two"], "images": ["0.png", None, None, "1.jpg", None]},
    )
    assert document.segments == (A, Text("one"), B, Text("two"))


URL = "https://example.org/a.jpg"


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([URL, URL, URL], [A, C]),  # the second could not be downloaded
        ([{"url": URL, "alt": "x"}, {"src": URL}, {}], [A, C]),
        (["2.jpg", URL, "0.png"], [C, A]),
        ([{"base64": base64.b64encode(b"B").decode()}, "0.png", URL], [B, A, C]),
        (["data:image/png;base64," + base64.b64encode(b"B").decode(), "0.png", "2.jpg"], [B, A, C]),
    ],
)
def test_interleaved_images_by_url_by_object_and_in_base64(images, expected):
    document = read("interleaved", **{"0.png": b"A", "2.jpg": b"C"}, json={"texts": [None] * 3, "images": images})
    assert list(document.segments) == expected


def test_images_are_ordered_by_number():
    members = {f"{number}.png": bytes([number]) for number in (10, 2, 1)}
    document = read("conversation", **members, json={"conversations": [TURN, ANSWER]})
    assert [segment.data for segment in document.segments if isinstance(segment, Image)] == [b"\1", b"\2", b"\n"]


TURN, ANSWER = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}
SYSTEM = {"from": "system", "value": "Be kind."}


@pytest.mark.parametrize(
    ("turns", "images", "expected"),
    [
        ([TURN, ANSWER], {}, [user("Why?"), assistant("So.")]),
        ([TURN, ANSWER], {"jpg": b"A"}, [user(""), A, user("\nWhy?"), assistant("So.")]),
        (
            [{"from": "human", "value": "<image>\nWhy?"}, ANSWER, TURN, ANSWER],
            {"jpg": b"A"},
            [user(""), A, user("\nWhy?"), assistant("So."), user("Why?"), assistant("So.")],
        ),
        (
            [{"from": "human", "value": "Is <image> or <image>"}, ANSWER],
            {"0.jpg": b"A", "1.jpg": b"B"},
            [user("Is "), A, user(" or "), B, assistant("So.")],
        ),
        (
            [TURN, ANSWER],
            {"0.jpg": b"A", "1.jpg": b"B"},
            [user(""), A, user("\n"), B, user("\nWhy?"), assistant("So.")],
        ),
        (
            [TURN, ANSWER, {"from": "human", "value": "And <image>?"}, ANSWER],
            {"jpg": b"A"},
            [user("Why?"), assistant("So."), user("And "), A, user("?"), assistant("So.")],
        ),
        (
            [
                {"role": "system", "content": "Be kind."},
                {"role": "USER", "content": "Why?"},
                {"role": "assistant", "content": "So."},
            ],
            {"png": b"A"},
            [system("Be kind."), user(""), A, user("\nWhy?"), assistant("So.")],
        ),
        # Only users show images: a tag in an answer is text.
        ([TURN, {"from": "gpt", "value": "<image>"}], {}, [user("Why?"), assistant("<image>")]),
    ],
)
@pytest.mark.parametrize("field", ["conversations", "conversation"])
def test_conversations(turns, images, expected, field):
    assert list(read("conversation", **images, json={field: turns}).segments) == expected


def test_a_source_may_have_a_system_prompt():
    convert, config = SCHEMAS["conversation"], source("conversation", system_prompt="Be brief.")

    def first(*turns):
        (document,) = convert({"json": json.dumps({"conversations": turns}).encode()}, config, "k")
        return document.segments[0]

    assert first(TURN, ANSWER) == system("Be brief.")
    own = {"from": "system", "value": "Be long."}
    assert first(own, TURN, ANSWER) == system("Be long.")


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"images": ["1.jpg", "0.jpg"]}, [B, A]),
        ({"images": ["coco/1.jpg", "coco/0.jpg"]}, [A, B]),  # paths of the set's own folders: by number
        ({"images": [{"path": "x"}, {"path": "y"}]}, [A, B]),
        ({"image": "1.jpg"}, [B]),
        ({"image": None}, [A, B]),
        ({"images": []}, [A, B]),
        ({"images": None, "image": "1.jpg"}, [B]),
    ],
)
def test_which_images_a_conversation_shows(named, expected):
    content = {"conversations": [TURN, ANSWER], **named}
    document = read("conversation", **{"0.jpg": b"A", "1.jpg": b"B"}, json=content)
    assert [segment for segment in document.segments if isinstance(segment, Image)] == expected


LLAVA = {"id": "1", "image": "coco/train2017/000000033471.jpg"}


@pytest.mark.parametrize(
    ("content", "images", "expected"),
    [
        (LLAVA, {"jpg": b"A"}, [user(""), A, user("\nWhy?"), assistant("So.")]),
        ({"id": "1", "image": "000000033471.jpg"}, {"jpg": b"A"}, [user(""), A, user("\nWhy?"), assistant("So.")]),
        (
            {"images": [{"bytes": None, "path": "a"}] * 2},
            {"0.jpg": b"A", "1.jpg": b"B"},
            [user(""), A, B, user("\nWhy?"), assistant("So.")],
        ),
        ({"id": "1"}, {}, [user("Why?"), assistant("So.")]),
        ({"image": None}, {}, [user("Why?"), assistant("So.")]),
        ({"image": ""}, {}, [user("Why?"), assistant("So.")]),
        ({"images": []}, {}, [user("Why?"), assistant("So.")]),
    ],
)
def test_conversations_as_llava_and_mantis_have_them(content, images, expected):
    value = "<image>" * len(images) + "\nWhy?"
    content = {**content, "conversations": [{"from": "human", "value": value}, ANSWER]}
    assert list(read("conversation", **images, json=content).segments) == expected


@pytest.mark.parametrize(
    ("named", "images", "message"),
    [
        (LLAVA, {}, '"image" names 1 images, but 0 are among the members'),
        ({"image": "coco/1.jpg"}, {"0.jpg": b"A", "1.jpg": b"B"}, '"image" names 1 images, but 2 are'),
        ({"images": ["a", "b", "c"]}, {"0.jpg": b"A", "1.jpg": b"B"}, '"images" names 3 images, but 2 are'),
        ({"images": 3}, {"0.jpg": b"A", "1.jpg": b"B"}, '"images" names 1 images, but 2 are'),
        ({"images": [None]}, {}, '"images" names 1 images, but 0 are'),
        ({"images": ["1.jpg", "2.jpg"]}, {"0.jpg": b"A", "1.jpg": b"B"}, "'2.jpg', which is no image of the sample"),
        ({"images": ["json"]}, {}, '"images" names 1 images, but 0 are'),
    ],
)
def test_named_images_that_are_no_members_are_errors(named, images, message):
    asked = {"conversations": [TURN, ANSWER], "prompt": "Why?", "chosen": "So.", "rejected": "No."}
    for schema in ("conversation", "preference"):
        with pytest.raises(SampleError, match=re.escape(message)):
            read_all(schema, **images, json=asked | named)


def test_an_image_that_only_others_than_users_mark_is_an_error():
    marked = {"from": "gpt", "value": "<image> So."}
    for turns, message in (
        ([TURN, marked], "<image> stands in turn 1, of the assistant"),
        ([{"from": "system", "value": "See <image>."}, TURN, ANSWER], "<image> stands in turn 0, of the system"),
    ):
        with pytest.raises(SampleError, match=message):
            read("conversation", jpg=b"A", json={"conversations": turns})
    for answers in ({"chosen": "<image>", "rejected": "No."}, {"chosen": "So.", "rejected": "<image>"}):
        with pytest.raises(SampleError, match="of the assistant"):
            read_all("preference", jpg=b"A", json={"prompt": "Why?", **answers})
    # A user shows the image, or a source's own prompt speaks of them: then it is text.
    shown = [{"from": "human", "value": "<image>"}, marked]
    assert read("conversation", jpg=b"A", json={"conversations": shown}).segments[-1] == assistant("<image> So.")
    members = {"jpg": b"A", "json": json.dumps({"conversations": [TURN, ANSWER]}).encode()}
    (document,) = SCHEMAS["conversation"](members, source("conversation", system_prompt="See <image>."), "k")
    assert document.segments[:3] == (system("See <image>."), user(""), A)


def test_a_preference_is_two_documents_with_one_prompt():
    content = {"prompt": "Why <image>?", "chosen": "So.", "rejected": " No. "}
    chosen, rejected = read_all("preference", jpg=b"A", json=content)
    assert (chosen.preference, rejected.preference) == ("chosen", "rejected")
    assert chosen.segments == (user("Why "), A, user("?"), assistant("So."))
    assert rejected.segments == (user("Why "), A, user("?"), assistant("No."))
    assert (chosen.source, chosen.key) == (rejected.source, rejected.key) == ("web", "000010005")
    text_only = read_all("preference", json={"prompt": "Why?", "chosen": "So.", "rejected": "No."})
    assert [document.segments[0] for document in text_only] == [user("Why?")] * 2


def test_safety_of_a_harmful_and_of_a_harmless_image():
    harmful = {"safe": False, "instr-resp": [{"instruction": "Why?", "response": "No."}]}
    assert read("safety", jpg=b"A", json=harmful).segments == (user(""), A, user("\nWhy?"), assistant("No."))
    harmless = {
        "safe": True,
        "instr-resp": [
            {"safe_instruction": "Why?", "response": "So."},
            {"unsafe_instruction": "How?", "response": "No."},
        ],
    }
    expected = (user(""), A, user("\nWhy?"), assistant("So."), user("How?"), assistant("No."))
    assert read("safety", jpg=b"A", json=harmless).segments == expected


@pytest.mark.parametrize(
    ("schema", "members", "message"),
    [
        ("caption", {"txt": b"a dog"}, "one image expected"),
        ("caption", {"jpg": b"A", "png": b"B", "txt": b"a dog"}, "one image expected"),
        ("caption", {"jpg": b"A"}, "no txt and no json"),
        ("caption", {"jpg": b"A", "txt": b" \n"}, "empty"),
        ("caption", {"jpg": b"A", "txt": b"\xff\xfe"}, "not UTF-8"),
        ("caption", {"jpg": b"A", "json": b"{"}, "can't be parsed"),
        ("caption", {"jpg": b"A", "json": b"[1]"}, "not an object"),
        ("caption", {"jpg": b"A", "json": {"caption": 3}}, "not a string but int"),
        ("caption", {"jpg": b"A", "json": b'{"caption": "\\ud800"}'}, "not valid Unicode"),
        ("text", {"json": b"[" * 100_000}, "can't be parsed"),
        ("text", {"json": b"1" * 5_000}, "can't be parsed"),
        ("interleaved", {"json": {"texts": ["a"], "images": []}}, "same length"),
        ("interleaved", {"json": {"texts": "a", "images": "b"}}, "same length"),
        ("interleaved", {"json": {"texts": ["a"], "images": ["0.png"]}}, "slot 0 holds both"),
        ("interleaved", {"json": {"texts": [None], "images": ["0.png"]}}, "not among the members"),
        ("interleaved", {"json": {"texts": [None], "images": [{"url": "x"}]}}, "neither text nor image"),
        ("interleaved", {"json": {"texts": [None], "images": [[1]]}}, "images.0. is not a string"),
        ("interleaved", {"json": {"texts": [None], "images": [{"base64": "?"}]}}, "not base64"),
        ("interleaved", {"json": {"texts": [None], "images": ["data:;base64,"]}}, "images.0. is empty"),
        ("interleaved", {"json": {"texts": [], "images": []}}, "at least one item"),
        ("interleaved", {"json": {"texts": ["a"] * 10_001, "images": [None] * 10_001}}, "limit is 10000"),
        ("conversation", {"json": {}}, "at least one item"),
        ("conversation", {"json": {"conversations": {}}}, "at least one item"),
        ("conversation", {"json": {"conversations": [TURN] * 1001}}, "limit is 1000"),
        ("conversation", {"json": {"conversations": ["Why?"]}}, "turn 0 is not an object"),
        ("conversation", {"json": {"conversations": [{"value": "Why?"}]}}, "the role of turn 0 is not a string"),
        ("conversation", {"json": {"conversations": [{"from": "tool", "value": "Why?"}]}}, "none of the roles"),
        ("conversation", {"json": {"conversations": [TURN, {"from": "gpt", "value": " "}]}}, "turn 1 is empty"),
        ("conversation", {"json": {"conversations": [TURN, TURN, ANSWER]}}, "turns 0 and 1 are both of the user"),
        ("conversation", {"json": {"conversations": [TURN]}}, "nothing to train on"),
        ("conversation", {"jpg": b"A", "json": {"conversations": [ANSWER]}}, "the first turn is the assistant's"),
        ("conversation", {"json": {"conversations": [SYSTEM, ANSWER]}}, "the first turn is the assistant's"),
        ("conversation", {"json": {"conversations": [SYSTEM, TURN]}}, "nothing to train on"),
        (
            "conversation",
            {"json": {"conversations": [TURN, SYSTEM, ANSWER]}},
            "turn 1 is of the system, which speaks first",
        ),
        (
            "conversation",
            {
                "0.jpg": b"A",
                "1.jpg": b"B",
                "json": {"conversations": [{"from": "human", "value": "Is <image>?"}, ANSWER]},
            },
            "1 <image> in the turns, but 2 images",
        ),
        ("conversation", {"json": {"conversations": [{"from": "human", "value": "<image>"}, ANSWER]}}, "but 0 images"),
        (
            "conversation",
            {"jpg": b"A", "json": {"conversations": [{"from": "human", "value": "<image><image>"}, ANSWER]}},
            "2 <image> in the turns, but 1 images",
        ),
        ("preference", {"json": {"prompt": "a", "chosen": "b"}}, '"rejected" is not a string'),
        ("preference", {"json": {"prompt": "a", "chosen": "b", "rejected": "b "}}, "are the same"),
        ("preference", {"json": {"prompt": "a <image>", "chosen": "b", "rejected": "c"}}, "1 <image> in the turns"),
        ("safety", {"json": {"instr-resp": [{"instruction": "a", "response": "b"}]}}, "one image expected"),
        ("safety", {"jpg": b"A", "json": {"safe": True}}, "at least one item"),
        ("safety", {"jpg": b"A", "json": {"instr-resp": [{"response": "b"}]}}, "0 instructions"),
        (
            "safety",
            {"jpg": b"A", "json": {"instr-resp": [{"instruction": "a", "safe_instruction": "a", "response": "b"}]}},
            "2 instructions",
        ),
        ("interleaved", {"json": {"texts": [None], "images": [None]}}, "neither text nor image"),
        ("ocr", {"png": b"A"}, "no json"),
        ("ocr", {"png": b"A", "json": {}}, "not a string but NoneType"),
        ("ocr", {"png": b"A", "json": {"lines": []}}, "at least one item"),
        ("ocr", {"png": b"A", "json": {"lines": ["381"]}}, "not an object"),
        ("ocr", {"png": b"A", "json": {"lines": [{"text": " "}]}}, "empty"),
        ("ocr", {"png": b"A", "json": {"lines": [{"text": "</ocr>"}]}}, "tags"),
        ("ocr", {"png": b"A", "json": {"lines": [{"text": "3", "bbox": [0, 0, 1]}]}}, "bbox"),
        ("ocr", {"png": b"A", "json": {"lines": [{"text": "3", "bbox": [0, 0, 1, 2]}]}}, "bbox"),
        ("ocr", {"png": b"A", "json": b'{"lines": [{"text": "3", "bbox": [0, 0, 1, NaN]}]}'}, "bbox"),
        ("ocr", {"png": b"A", "json": {"lines": [{"text": "3", "bbox": [0, 0, 1, 10**400]}]}}, "bbox"),
    ],
)
def test_malformed_samples_say_what_and_where(schema, members, message):
    with pytest.raises(SampleError, match=message) as caught:
        read(schema, **members)
    assert "source web, key 000010005" in str(caught.value)


def test_sizes_are_bounded(monkeypatch):
    monkeypatch.setattr(members_module, "MAX_TEXT_BYTES", 10)
    monkeypatch.setattr(members_module, "MAX_IMAGE_BYTES", 20)
    assert read("caption", jpg=b"A" * 20, txt=b"a" * 10)
    with pytest.raises(SampleError, match="txt has 11 bytes"):
        read("caption", jpg=b"A" * 20, txt=b"a" * 11)
    with pytest.raises(SampleError, match="jpg has 21 bytes"):
        read("caption", jpg=b"A" * 21, txt=b"a" * 10)


words = st.text(alphabet="a é\n<>/ocrbx\ud800", max_size=12) | st.sampled_from(["<image>", "<image>\n<image>", "gpt"])
keys = st.sampled_from(
    ["text", "bbox", "from", "role", "value", "content", "granularity", "base64", "response", "instruction"]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
turns = st.lists(
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]), "value": words | anything}), max_size=4
)
FIELDS = [
    *("text", "caption", "texts", "images", "image", "lines", "captions", "objects", "conversation", "conversations"),
    *("prompt", "chosen", "rejected", "instr-resp"),
]


@given(
    st.sampled_from(sorted(SCHEMAS)),
    st.integers(1, 6),
    st.dictionaries(st.sampled_from(FIELDS), anything | turns | words),
    st.dictionaries(st.sampled_from(["png", "jpg", "txt", "0.png", "1.jpg"]), st.binary(max_size=8)),
)
def test_whatever_the_sample_holds_the_outcome_is_documents_or_a_sample_error(schema, granularity, content, members):
    members = {**members, "json": json.dumps(content).encode()}
    try:
        documents = SCHEMAS[schema](members, source(schema, granularity=granularity), "0")
    except SampleError:
        return
    for document in documents:
        assert document.segments
        images = [segment for segment in document.segments if isinstance(segment, Image)]
        texts = [segment for segment in document.segments if isinstance(segment, Text)]
        assert all(image.data in members.values() or schema == "interleaved" for image in images)
        assert all(bool(text.role) is (schema in CHAT_SCHEMAS) for text in texts)
        assert all(text.loss is (text.role in ("", "assistant")) for text in texts)
        "".join(text.text for text in texts).encode()
