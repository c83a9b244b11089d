import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megablip.data import schemas
from megablip.data.schemas import SCHEMAS
from megablip.errors import SampleError
from megablip.records import Image, Text


def read(schema, **members):
    members = {name.replace("_", "."): value for name, value in members.items()}
    if not isinstance(members.get("json", b""), bytes):
        members["json"] = json.dumps(members["json"]).encode()
    return SCHEMAS[schema](members, "web", "000010005")


def test_caption_from_txt_or_json():
    document = read("caption", jpg=b"\xff", txt=b" a dog\n")
    assert document.segments == (Image(b"\xff"), Text("a dog"))
    assert (document.source, document.key) == ("web", "000010005")
    assert read("caption", webp=b"\xff", json={"caption": "a dog"}).segments == document.segments
    assert read("caption", png=b"\xff", txt=b"a dog", json={"caption": "other"}).segments == document.segments


def test_text_from_txt_or_json():
    assert read("text", txt="été".encode()).segments == (Text("été"),)
    assert read("text", json={"text": "été"}).segments == (Text("été"),)


def test_interleaved_slots_in_order():
    document = read(
        "interleaved",
        **{"0.png": b"A", "1.jpg": b"B"},
        json={"texts": [None, "one", None, None, "two"], "images": ["0.png", None, None, "1.jpg", None]},
    )
    assert document.segments == (Image(b"A"), Text("one"), Image(b"B"), Text("two"))


def test_ocr_with_and_without_boxes():
    assert read("ocr", png=b"A", json={"text": "381"}).segments == (Image(b"A"), Text("<ocr>381</ocr>"))
    lines = [{"text": "381", "bbox": [0, 0.25, 0.5, 1]}, {"text": "2"}]
    expected = "<ocr>381</ocr><bbox>[0.00, 0.25][0.50, 1.00]</bbox>\n<ocr>2</ocr>"
    assert read("ocr", png=b"A", json={"lines": lines}).segments == (Image(b"A"), Text(expected))


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
        ("interleaved", {"json": {"texts": [None], "images": [{"url": "x"}]}}, "images.0. is not a string"),
        ("interleaved", {"json": {"texts": [None], "images": [None]}}, "neither text nor image"),
        ("ocr", {"png": b"A"}, "no json"),
        ("ocr", {"png": b"A", "json": {}}, "not a string but NoneType"),
        ("ocr", {"png": b"A", "json": {"lines": []}}, "at least one line"),
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
    monkeypatch.setattr(schemas, "MAX_TEXT_BYTES", 10)
    monkeypatch.setattr(schemas, "MAX_IMAGE_BYTES", 20)
    assert read("caption", jpg=b"A" * 20, txt=b"a" * 10)
    with pytest.raises(SampleError, match="txt has 11 bytes"):
        read("caption", jpg=b"A" * 20, txt=b"a" * 11)
    with pytest.raises(SampleError, match="jpg has 21 bytes"):
        read("caption", jpg=b"A" * 21, txt=b"a" * 10)


words = st.text(alphabet="a é\n<>/ocrbx\ud800", max_size=12)
keys = st.sampled_from(["text", "bbox", "x"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from(sorted(SCHEMAS)),
    st.dictionaries(st.sampled_from(["text", "caption", "texts", "images", "lines"]), anything),
    st.dictionaries(st.sampled_from(["png", "jpg", "txt", "0.png"]), st.binary(max_size=8)),
)
def test_whatever_the_sample_holds_the_outcome_is_a_document_or_a_sample_error(schema, content, members):
    try:
        document = SCHEMAS[schema]({**members, "json": json.dumps(content).encode()}, "web", "0")
    except SampleError:
        return
    assert document.segments
