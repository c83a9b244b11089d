"""From the members of a tar sample to a Document; one function per on-disk schema.

A schema takes `(members, source, key)`, where `members` maps the part of each
member's name after the first dot to its bytes ("jpg", "json", "0.png"), as
webdataset groups them.  Nothing after this module knows how a data set is laid
out.  Samples are untrusted: what doesn't fit is a SampleError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from megablip.errors import SampleError
from megablip.records import Document, Image, Text
from megablip.tokens import OCR_TAGS

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

# A page of text is some kB and the longest book some MB; beyond that a sample
# is broken, and its parse alone could fill a worker's memory.
MAX_TEXT_BYTES = 16 * 2**20
# A camera's largest JPEG or a scanned page is tens of MB.
MAX_IMAGE_BYTES = 64 * 2**20

Members = Mapping[str, bytes]
Schema = Callable[[Members, str, str], Document]


def caption(members: Members, source: str, key: str) -> Document:
    """img2dataset's layout: one image, and its caption in `txt` or in `json` under "caption"."""
    return _document([_only_image(members), Text(_text(members, "caption"))], source, key)


def text(members: Members, source: str, key: str) -> Document:
    """Text alone: `txt`, or `json` with "text"."""
    return _document([Text(_text(members, "text"))], source, key)


def ocr(members: Members, source: str, key: str) -> Document:
    """One image and the text in it, as BLIP-3's finest OCR captions (arXiv 2408.08872, figure 4).

    `json` is {"text": str} for the text alone, or {"lines": [{"text": str,
    "bbox": [x1, y1, x2, y2]}, ...]} with boxes as shares of width and height
    (a line may lack its box).  A line becomes
    `<ocr>text</ocr><bbox>[x1, y1][x2, y2]</bbox>`.
    """
    image, content = _only_image(members), _json(members)
    lines = content.get("lines", [{"text": content.get("text")}])
    if not isinstance(lines, list) or not lines:
        raise SampleError('"lines" is not a list with at least one line')
    return _document([image, Text("\n".join(_ocr_line(line) for line in lines))], source, key)


def interleaved(members: Members, source: str, key: str) -> Document:
    """Parallel lists `texts` and `images` in `json`: each slot holds one or the other, null elsewhere.

    An image is named by its member, such as "0.png".  A slot with neither (an
    image that could not be downloaded) is left out.
    """
    content = _json(members)
    texts, images = content.get("texts"), content.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise SampleError('"texts" and "images" are not two lists of the same length')
    segments: list[Text | Image] = []
    for slot, (words, name) in enumerate(zip(texts, images, strict=True)):
        if words is not None and name is not None:
            raise SampleError(f"slot {slot} holds both a text and an image")
        if words is not None:
            segments.append(Text(_string(words, f"texts[{slot}]")))
        elif name is not None:
            segments.append(_image(members, _string(name, f"images[{slot}]")))
    return _document(segments, source, key)


def _located(schema: Schema) -> Schema:
    """Let a schema's errors say which sample is wrong."""

    def convert(members: Members, source: str, key: str) -> Document:
        try:
            return schema(members, source, key)
        except SampleError as error:
            raise SampleError(error.what, where=f"source {source}, key {key}", remedy=error.remedy) from None

    return convert


SCHEMAS: dict[str, Schema] = {schema.__name__: _located(schema) for schema in (caption, interleaved, ocr, text)}


def _document(segments: list[Text | Image], source: str, key: str) -> Document:
    if not segments:
        raise SampleError("the sample has neither text nor image")
    return Document(tuple(segments), source, key)


def _only_image(members: Members) -> Image:
    names = [name for name in IMAGE_EXTENSIONS if name in members]
    if len(names) != 1:
        raise SampleError(f"one image expected ({', '.join(IMAGE_EXTENSIONS)}), members are {sorted(members)[:20]}")
    return _image(members, names[0])


def _image(members: Members, name: str) -> Image:
    if name not in members:
        raise SampleError(f"image '{name[:80]}' is not among the members {sorted(members)[:20]}")
    return Image(_bounded(members, name, MAX_IMAGE_BYTES))


def _text(members: Members, field: str) -> str:
    """The text of the `txt` member, else the named field of the `json` member."""
    if "txt" in members:
        try:
            words = _bounded(members, "txt", MAX_TEXT_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise SampleError(f"txt is not UTF-8: {error}") from None
    elif "json" in members:
        words = _string(_json(members).get(field), f'"{field}"')
    else:
        raise SampleError(f"no txt and no json among the members {sorted(members)[:20]}")
    words = words.strip()
    if not words:
        raise SampleError("the text is empty")
    return words


def _json(members: Members) -> dict[str, Any]:
    if "json" not in members:
        raise SampleError(f"no json among the members {sorted(members)[:20]}")
    try:
        content = json.loads(_bounded(members, "json", MAX_TEXT_BYTES))
    except (ValueError, RecursionError) as error:  # ValueError: syntax, encoding, or an endless number
        raise SampleError(f"json can't be parsed: {error}") from None
    if not isinstance(content, dict):
        raise SampleError(f"json holds a {type(content).__name__}, not an object")
    return content


def _bounded(members: Members, name: str, limit_bytes: int) -> bytes:
    if len(members[name]) > limit_bytes:
        raise SampleError(f"{name} has {len(members[name])} bytes, the limit is {limit_bytes}")
    return members[name]


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise SampleError(f"{name} is not a string but {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise SampleError(f"{name} is not valid Unicode") from None
    return value


def _ocr_line(line: Any) -> str:
    if not isinstance(line, dict):
        raise SampleError(f"a line is not an object but {type(line).__name__}")
    words = _string(line.get("text"), "the text of a line").strip()
    if not words:
        raise SampleError("the text of a line is empty")
    if any(tag in words for tag in OCR_TAGS):
        raise SampleError(f"the text of a line contains one of the tags {' '.join(OCR_TAGS)}")
    box = line.get("bbox")
    return f"<ocr>{words}</ocr>" + ("" if box is None else _bbox(box))


def _bbox(box: Any) -> str:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_share(value) for value in box):
        raise SampleError("a bbox is not [x1, y1, x2, y2] with values from 0 to 1")
    x1, y1, x2, y2 = (f"{value:.2f}" for value in box)
    return f"<bbox>[{x1}, {y1}][{x2}, {y2}]</bbox>"


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # a bool is an int to isinstance; NaN compares false
