"""The members of a tar sample: texts, JSON and images, their sizes and types checked.

`members` maps the part of each member's name after the first dot to its bytes
("jpg", "json", "0.png"), as webdataset groups them.  Samples are untrusted:
whatever is not as a schema needs it is a SampleError.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from megablip.errors import SampleError
from megablip.records import Image

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "tif", "tiff", "bmp")

# A page of text is some kB and the longest book some MB; beyond that a sample
# is broken, and its parse alone could fill a worker's memory.
MAX_TEXT_BYTES = 16 * 2**20
# A camera's largest JPEG or a scanned page is tens of MB.
MAX_IMAGE_BYTES = 64 * 2**20

Members = Mapping[str, bytes]


def read_text(members: Members, field: str) -> str:
    """The text of the `txt` member, else the named field of the `json` member; never empty."""
    if "txt" in members:
        try:
            words = _bounded(members, "txt", MAX_TEXT_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise SampleError(f"txt is not UTF-8: {error}") from None
    elif "json" in members:
        words = string(read_json(members).get(field), f'"{field}"')
    else:
        raise SampleError(f"no txt and no json among the members {_names(members)}")
    return filled(words, "the text")


def read_json(members: Members) -> dict[str, Any]:
    """The object in the `json` member."""
    if "json" not in members:
        raise SampleError(f"no json among the members {_names(members)}")
    content = parse_json(_bounded(members, "json", MAX_TEXT_BYTES), "json")
    if not isinstance(content, dict):
        raise SampleError(f"json holds a {type(content).__name__}, not an object")
    return content


def parse_json(text: bytes | str, name: str) -> Any:
    """Any JSON value."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: syntax, encoding, or an endless number
        raise SampleError(f"{name} can't be parsed: {error}") from None


def image_names(members: Members) -> list[str]:
    """The members that are images, in order: `jpg` first, then `0.png`, `1.png`, `10.png`."""

    def order(name: str) -> tuple[int, str]:
        stem = name.rpartition(".")[0]
        return (int(stem) if stem.isdecimal() and len(stem) < 10 else -1, name)

    return sorted((name for name in members if name.rpartition(".")[2] in IMAGE_EXTENSIONS), key=order)


def only_image(members: Members) -> Image:
    """The image of a sample that has one."""
    names = image_names(members)
    if len(names) != 1:
        raise SampleError(f"one image expected ({', '.join(IMAGE_EXTENSIONS)}), members are {_names(members)}")
    return image(members, names[0])


def image(members: Members, name: str) -> Image:
    """The image in the member `name`."""
    if name not in members:
        raise SampleError(f"image '{name[:80]}' is not among the members {_names(members)}")
    return Image(_bounded(members, name, MAX_IMAGE_BYTES))


def base64_image(text: str, name: str) -> Image:
    """An image written as base64; JSON's bound on bytes has bounded it."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise SampleError(f"{name} is not base64: {error}") from None
    if not data:
        raise SampleError(f"{name} is empty")
    return Image(data)


def string(value: Any, name: str) -> str:
    """`value` if it is text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise SampleError(f"{name} is not a string but {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise SampleError(f"{name} is not valid Unicode") from None
    return value


def filled(value: Any, name: str) -> str:
    """`value` if it is text that says something, stripped."""
    words = string(value, name).strip()
    if not words:
        raise SampleError(f"{name} is empty")
    return words


def sequence(value: Any, name: str, most: int) -> list[Any]:
    """`value` if it is a list with 1 to `most` items."""
    if not isinstance(value, list) or not value:
        raise SampleError(f"{name} is not a list with at least one item")
    if len(value) > most:
        raise SampleError(f"{name} has {len(value)} items, the limit is {most}")
    return value


def mapping(value: Any, name: str) -> dict[str, Any]:
    """`value` if it is an object."""
    if not isinstance(value, dict):
        raise SampleError(f"{name} is not an object but {type(value).__name__}")
    return value


def _bounded(members: Members, name: str, limit_bytes: int) -> bytes:
    if len(members[name]) > limit_bytes:
        raise SampleError(f"{name} has {len(members[name])} bytes, the limit is {limit_bytes}")
    return members[name]


def _names(members: Members) -> list[str]:
    return [name[:80] for name in sorted(members)[:20]]
