"""Captions that say where things are: text in an image (OCR), and objects (grounding).

BLIP-3 writes the same boxes in several styles, from words to exact coordinates
(arXiv 2408.08872, figure 4).  Boxes are [x1, y1, x2, y2] as shares of the
image's width and height, from its top left corner.

    OCR         1  the text alone
                2  "Exit" located above the center
                3  "Exit" located at 1/5 of the image from top to bottom and 1/2 of the image from left to right
                4  "Exit" approximately starts at [0.3, 0.1] and extends up to [0.7, 0.3]
                5  "Exit" starts at [0.312, 0.124] and extends up to [0.688, 0.271]
                6  <ocr>Exit</ocr><bbox>[0.31, 0.12][0.69, 0.27]</bbox>
    grounding   1  a dog in the top left corner of the image
                2  a dog starts at [0.105, 0.052] and extends up to [0.388, 0.311]
                3  <object>a dog</object><bbox>[0.10, 0.05][0.39, 0.31]</bbox>

The published sets hold such captions ready made in all styles; here one is chosen.
"""

from __future__ import annotations

import ast
import re
from contextlib import suppress
from fractions import Fraction
from typing import Any, NamedTuple

from megablip.data.members import filled, mapping, parse_json, sequence
from megablip.errors import SampleError
from megablip.tokens import OBJECT_TAGS, OCR_TAGS

MAX_REGIONS = 10_000  # a page of small print has some thousand words
# Looking for the mentions of many objects in a long text takes their product.
MAX_OBJECTS, MAX_GROUNDED_CHARACTERS = 1000, 50_000
FINEST_OCR, FINEST_GROUNDING = 6, 3

# The sizes of the fractions of OCR's third style: 2/17 is one of the paper's.
_MAX_DENOMINATOR = 20
# Share of width or height that counts as the middle.
_CENTER = (0.4, 0.6)
_THIRDS = (1 / 3, 2 / 3)

# BLIP-3's loader strips such filler from OCR captions, since it hurts (section 5.1).
_FILLER = re.compile(r"\bthe text (?=[\"'\u201c\u2018<])", re.IGNORECASE)

# A list in Python's notation, as BLIP3-GROUNDING-50M has it, is parsed by Python's own parser.
_MAX_LITERAL_CHARACTERS = 2**18


class Box(NamedTuple):
    x1: float
    y1: float
    x2: float
    y2: float


def ocr_caption(content: dict[str, Any], granularity: int) -> str:
    """The text in an image: from "captions" where there are any, else from "lines" or "text".

    captions: [{"text": str, "granularity": 0 to 5}, ...], or this list as a string
        of JSON, as BLIP3-OCR-200M has it.
    lines: [{"text": str, "bbox": [x1, y1, x2, y2]}, ...]; a line may lack its box.
    text: the text of the only line.
    """
    if "captions" in content:
        return _FILLER.sub("", _published_ocr(content["captions"], granularity))
    lines = sequence(content.get("lines", [{"text": content.get("text")}]), '"lines"', MAX_REGIONS)
    return "\n".join(_ocr_line(line, granularity) for line in lines)


def grounding_caption(content: dict[str, Any], granularity: int) -> str:
    """A caption with the places of its objects: from "captions" where there are any, else from the objects.

    captions: [[caption, style, ...], ...], or this list as a string of JSON or of
        Python, as BLIP3-GROUNDING-50M has it.  The styles are told apart by what
        is written, since the numbers' meaning is not published.
    caption, objects: str and [{"text": str, "bbox": [x1, y1, x2, y2]}, ...].  An
        object's place follows its first free mention in the caption; one that
        is not mentioned comes on a line of its own.
    """
    granularity = min(granularity, FINEST_GROUNDING)
    if "captions" in content:
        return _published_grounding(content["captions"], granularity)
    caption = filled(content.get("caption"), '"caption"')
    _check_tags(caption, '"caption"')
    if len(caption) > MAX_GROUNDED_CHARACTERS:
        raise SampleError(f'"caption" has {len(caption)} characters, the limit is {MAX_GROUNDED_CHARACTERS}')
    mentions: list[tuple[int, int, str]] = []  # start, end, what stands there instead
    others: list[str] = []
    taken = bytearray(len(caption))  # 1 where a mention is
    searched: dict[str, int] = {}  # how far, for each name
    for item in sequence(content.get("objects"), '"objects"', MAX_OBJECTS):
        name, box = _region(item, "an object")
        if box is None:
            raise SampleError("an object has no bbox")
        start = caption.find(name, searched.get(name, 0))
        while start >= 0 and taken.find(1, start, start + len(name)) >= 0:
            start = caption.find(name, start + len(name))
        end = start + len(name)
        searched[name] = end if start >= 0 else len(caption)
        if start >= 0:
            taken[start:end] = b"\1" * len(name)
            mentions.append((start, end, _object_place(name, box, granularity)))
        else:
            others.append(_object_place(name, box, granularity))
    pieces, written = [], 0
    for start, end, place in sorted(mentions):
        pieces += [caption[written:start], place]
        written = end
    return "\n".join(["".join([*pieces, caption[written:]]), *others])


def _published_ocr(captions: Any, granularity: int) -> str:
    if isinstance(captions, str):
        captions = parse_json(captions, '"captions"')
    found: list[tuple[bool, str]] = []
    for entry in sequence(captions, '"captions"', MAX_REGIONS):
        entry = mapping(entry, "an entry of captions")
        if entry.get("granularity") == granularity - 1:
            # Where a style comes twice, one of the two has the page's alt text mixed in.
            found.append((entry.get("include_datacomp_raw_cap") is True, filled(entry.get("text"), "a caption")))
    if not found:
        raise SampleError(f'no entry of "captions" has granularity {granularity - 1}')
    return min(found, key=lambda caption: caption[0])[1]


def _published_grounding(captions: Any, granularity: int) -> str:
    if isinstance(captions, str):
        captions = _literal(captions)
    found: list[tuple[bool, str]] = []
    for entry in sequence(captions, '"captions"', MAX_REGIONS):
        caption = filled(entry[0] if isinstance(entry, list | tuple) and entry else None, "a caption")
        if _grounding_style(caption) == granularity:
            found.append((len(entry) > 2 and entry[2] is True, caption))
    if not found:
        raise SampleError(f'no entry of "captions" is written in style {granularity}')
    return min(found, key=lambda caption: caption[0])[1]


def _grounding_style(caption: str) -> int:
    if "<bbox>" in caption:
        return 3
    return 2 if "starts at" in caption.lower() else 1


def _literal(text: str) -> Any:
    with suppress(SampleError):
        return parse_json(text, '"captions"')
    if len(text) > _MAX_LITERAL_CHARACTERS:
        raise SampleError(f'"captions" has {len(text)} characters, the limit is {_MAX_LITERAL_CHARACTERS}')
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # its messages quote the text
        raise SampleError('"captions" is a list neither in JSON nor in Python') from None


def _ocr_line(line: Any, granularity: int) -> str:
    words, box = _region(line, "a line")
    if granularity == FINEST_OCR:
        return f"<ocr>{words}</ocr>" + ("" if box is None else _bbox(box))
    if granularity == 1 or box is None:
        return words
    if granularity == 2:
        return f'"{words}" located {_from_center(box)} the center'
    if granularity == 3:
        x, y = (Fraction(share).limit_denominator(_MAX_DENOMINATOR) for share in _middle(box))
        return f'"{words}" located at {y} of the image from top to bottom and {x} of the image from left to right'
    if granularity == 4:
        return f'"{words}" approximately {_span(box, digits=1)}'
    return f'"{words}" {_span(box, digits=3)}'


def _object_place(name: str, box: Box, granularity: int) -> str:
    if granularity == FINEST_GROUNDING:
        return f"<object>{name}</object>{_bbox(box)}"
    return f"{name} {_span(box, digits=3)}" if granularity == 2 else f"{name} {_position(box)} of the image"


def _region(item: Any, name: str) -> tuple[str, Box | None]:
    """Text and box of a line or an object."""
    item = mapping(item, name)
    words = filled(item.get("text"), f"the text of {name}")
    _check_tags(words, f"the text of {name}")
    box = item.get("bbox")
    if box is None:
        return words, None
    if not isinstance(box, list) or len(box) != 4 or not all(_is_share(value) for value in box):
        raise SampleError("a bbox is not [x1, y1, x2, y2] with values from 0 to 1")
    if box[0] > box[2] or box[1] > box[3]:
        raise SampleError("a bbox is not [x1, y1, x2, y2] with x1 <= x2 and y1 <= y2")
    return words, Box(*box)


def _check_tags(words: str, name: str) -> None:
    if any(tag in words for tag in (*OCR_TAGS, *OBJECT_TAGS)):
        raise SampleError(f"{name} contains one of the tags {' '.join((*OCR_TAGS, *OBJECT_TAGS))}")


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # a bool is an int to isinstance; NaN compares false


def _bbox(box: Box) -> str:
    x1, y1, x2, y2 = (f"{value:.2f}" for value in box)
    return f"<bbox>[{x1}, {y1}][{x2}, {y2}]</bbox>"


def _span(box: Box, digits: int) -> str:
    x1, y1, x2, y2 = (f"{value:.{digits}f}" for value in box)
    return f"starts at [{x1}, {y1}] and extends up to [{x2}, {y2}]"


def _middle(box: Box) -> tuple[float, float]:
    return (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2


def _from_center(box: Box) -> str:
    """How OCR's second style says it: `above and to the left of`, `at`."""
    x, y = _middle(box)
    parts = []
    if not _CENTER[0] <= y <= _CENTER[1]:
        parts.append("above" if y < _CENTER[0] else "below")
    if not _CENTER[0] <= x <= _CENTER[1]:
        parts.append("to the left of" if x < _CENTER[0] else "to the right of")
    return " and ".join(parts) or "at"


def _position(box: Box) -> str:
    """How grounding's first style says it: `in the top left corner`, `on the left`, `in the center`."""
    x, y = _middle(box)
    row = "top" if y < _THIRDS[0] else "bottom" if y > _THIRDS[1] else ""
    column = "left" if x < _THIRDS[0] else "right" if x > _THIRDS[1] else ""
    if row and column:
        return f"in the {row} {column} corner"
    if row:
        return f"at the {row}"
    return f"on the {column}" if column else "in the center"
