"""Captions with places, in every style of the paper's figure 4."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megablip.config import SourceConfig
from megablip.data.schemas import SCHEMAS
from megablip.errors import SampleError
from megablip.records import Image, Text


def caption(schema, content, granularity=6):
    config = SourceConfig(name="web", shards="", schema=schema, weight=1, granularity=granularity)
    (document,) = SCHEMAS[schema]({"jpg": b"A", "json": json.dumps(content).encode()}, config, "k")
    image, text = document.segments
    assert image == Image(b"A")
    assert text == Text(text.text, loss=True, role="")
    return text.text


EXIT = {"text": "Exit", "bbox": [0.312, 0.124, 0.688, 0.271]}


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        (1, "Exit"),
        (2, '"Exit" located above the center'),
        (3, '"Exit" located at 1/5 of the image from top to bottom and 1/2 of the image from left to right'),
        (4, '"Exit" approximately starts at [0.3, 0.1] and extends up to [0.7, 0.3]'),
        (5, '"Exit" starts at [0.312, 0.124] and extends up to [0.688, 0.271]'),
        (6, "<ocr>Exit</ocr><bbox>[0.31, 0.12][0.69, 0.27]</bbox>"),
    ],
)
def test_the_six_styles_of_ocr(granularity, expected):
    assert caption("ocr", {"lines": [EXIT]}, granularity) == expected
    unplaced = "<ocr>Way</ocr>" if granularity == 6 else "Way"
    assert caption("ocr", {"lines": [EXIT, {"text": " Way "}]}, granularity) == f"{expected}\n{unplaced}"


def test_ocr_of_one_line():
    assert caption("ocr", {"text": "381"}) == "<ocr>381</ocr>"
    assert caption("ocr", {"text": "381"}, granularity=3) == "381"


@pytest.mark.parametrize(
    ("middle", "place"),
    [
        ((0.5, 0.5), "at the center"),
        ((0.4, 0.6), "at the center"),
        ((0.5, 0.39), "above the center"),
        ((0.5, 0.61), "below the center"),
        ((0.1, 0.5), "to the left of the center"),
        ((0.9, 0.1), "above and to the right of the center"),
    ],
)
def test_places_about_the_center(middle, place):
    x, y = middle
    assert caption("ocr", {"lines": [{"text": "a", "bbox": [x, y, x, y]}]}, 2) == f'"a" located {place}'


PUBLISHED = [
    {"text": 'The image contains the text "A", the text "B"', "granularity": 0, "include_datacomp_raw_cap": False},
    {"text": 'alt: the text "A"', "granularity": 1, "include_datacomp_raw_cap": True},
    {"text": '"A" above. THE TEXT "B" below the text of a law', "granularity": 1},
    {"text": "the text <ocr>A</ocr>", "granularity": 5},
    {"text": "alt", "granularity": 2, "include_datacomp_raw_cap": True},
]


@pytest.mark.parametrize("wrap", [list, json.dumps])
@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        (1, 'The image contains "A", "B"'),
        (2, '"A" above. "B" below the text of a law'),  # the one without the page's alt text, though second
        (3, "alt"),
        (6, "<ocr>A</ocr>"),
    ],
)
def test_published_ocr_captions(wrap, granularity, expected):
    assert caption("ocr", {"captions": wrap(PUBLISHED)}, granularity) == expected


DOGS = {
    "caption": "a dog and a dog with a red ball",
    "objects": [
        {"text": "a dog", "bbox": [0.1, 0.1, 0.2, 0.2]},
        {"text": "a red ball", "bbox": [0.4, 0.4, 0.6, 0.6]},
        {"text": "a dog", "bbox": [0.7, 0.4, 0.9, 0.6]},
        {"text": "red ball", "bbox": [0.4, 0.8, 0.6, 1]},
    ],
}


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        (
            1,
            "a dog in the top left corner of the image and a dog on the right of the image with a red ball in the "
            "center of the image\nred ball at the bottom of the image",
        ),
        (
            2,
            "a dog starts at [0.100, 0.100] and extends up to [0.200, 0.200] and "
            "a dog starts at [0.700, 0.400] and extends up to [0.900, 0.600] with "
            "a red ball starts at [0.400, 0.400] and extends up to [0.600, 0.600]\n"
            "red ball starts at [0.400, 0.800] and extends up to [0.600, 1.000]",
        ),
        (
            3,
            "<object>a dog</object><bbox>[0.10, 0.10][0.20, 0.20]</bbox> and "
            "<object>a dog</object><bbox>[0.70, 0.40][0.90, 0.60]</bbox> with "
            "<object>a red ball</object><bbox>[0.40, 0.40][0.60, 0.60]</bbox>\n"
            "<object>red ball</object><bbox>[0.40, 0.80][0.60, 1.00]</bbox>",
        ),
    ],
)
def test_the_three_styles_of_grounding(granularity, expected):
    assert caption("grounding", DOGS, granularity) == expected
    if granularity == 3:
        assert caption("grounding", DOGS, 6) == expected  # the recipe's default is the finest


GROUNDED = [
    ["<object>a dog</object><bbox>[0.1, 0.1][0.2, 0.2]</bbox>", 0, False],
    ["A dog Starts at (0.1, 0.1)", 1, True],
    ["a dog starts at (0.1, 0.1)", 1, False],
    ["a dog in the center", 2, False],
]


@pytest.mark.parametrize("wrap", [list, json.dumps, repr])
@pytest.mark.parametrize(("granularity", "index"), [(1, 3), (2, 2), (3, 0)])
def test_published_grounding_captions(wrap, granularity, index):
    assert caption("grounding", {"captions": wrap(GROUNDED)}, granularity) == GROUNDED[index][0]


BOX = [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("schema", "content", "message"),
    [
        ("ocr", {"captions": "["}, "can't be parsed"),
        ("ocr", {"captions": [["a", 0]]}, "not an object"),
        ("ocr", {"captions": PUBLISHED[:1]}, "no entry of .captions. has granularity 5"),
        ("ocr", {"captions": [{"granularity": 5}]}, "a caption is not a string"),
        ("ocr", {"lines": [EXIT] * 10_001}, "limit is 10000"),
        ("ocr", {"lines": [{"text": "a", "bbox": [0.5, 0, 0.4, 1]}]}, "x1 <= x2"),
        ("ocr", {"lines": [{"text": "a", "bbox": [0, True, 1, 1]}]}, "from 0 to 1"),
        ("ocr", {"lines": [{"text": "a<object>"}]}, "tags"),
        ("grounding", {"caption": "a"}, "at least one item"),
        ("grounding", {"caption": "a", "objects": [{"text": "a"}]}, "has no bbox"),
        ("grounding", {"caption": "a" * 50_001, "objects": [{"text": "a", "bbox": BOX}]}, "limit is 50000"),
        ("grounding", {"caption": "a", "objects": [{"text": "a", "bbox": BOX}] * 1001}, "limit is 1000"),
        ("grounding", {"caption": "<bbox>", "objects": [{"text": "a", "bbox": BOX}]}, "tags"),
        ("grounding", {"caption": " ", "objects": [{"text": "a", "bbox": BOX}]}, "empty"),
        ("grounding", {"captions": "__import__('os').system('true')"}, "neither in JSON nor in Python"),
        ("grounding", {"captions": "[" * 100_000}, "neither in JSON nor in Python"),
        ("grounding", {"captions": "-" * 100_000 + "1"}, "neither in JSON nor in Python"),
        ("grounding", {"captions": "[" + " " * 300_000}, "limit is 262144"),
        ("grounding", {"captions": "[('a',)]"}, "style 3"),
        ("grounding", {"captions": "[()]"}, "not a string"),
        ("grounding", {"captions": "{'a': 1}"}, "not a list"),
    ],
)
def test_malformed_regions(schema, content, message):
    with pytest.raises(SampleError, match=message):
        caption(schema, content)


shares = st.floats(0, 1)


@given(st.lists(st.tuples(shares, shares, shares, shares), min_size=1, max_size=5), st.integers(1, 6))
def test_coordinates_are_written_without_exponents(boxes, granularity):
    lines = [{"text": "a", "bbox": [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]} for x1, y1, x2, y2 in boxes]
    for number in re.findall(r"[\d.e-]*\d[\d.e-]*", caption("ocr", {"lines": lines}, granularity).replace("/", " ")):
        assert re.fullmatch(r"[01]\.\d+" if granularity > 3 else r"\d+", number)
    assert caption("grounding", {"caption": "a", "objects": lines}, granularity)
