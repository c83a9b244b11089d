"""From the members of a tar sample to documents; one function per on-disk schema.

    SCHEMAS["caption"](members, source_config, key) -> (document,)

A preference pair is two documents, the chosen one first; every other sample is
one.  Nothing after this module knows how a data set is laid out.  Samples are
untrusted: what doesn't fit is a SampleError.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

from megablip.config import SourceConfig
from megablip.data.members import (
    Members,
    base64_image,
    filled,
    image,
    image_names,
    mapping,
    only_image,
    read_json,
    read_text,
    sequence,
    string,
)
from megablip.data.regions import grounding_caption, ocr_caption
from megablip.errors import SampleError
from megablip.records import Document, Image, Text
from megablip.tokens import IMAGE_TOKEN

Schema = Callable[[Members, SourceConfig, str], tuple[Document, ...]]
Segments = list[Text | Image]
Role = Literal["system", "user", "assistant"]

MAX_SEGMENTS = 10_000  # texts and images of a document; no sequence holds so many
MAX_TURNS = 1000

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def caption(members: Members, source: SourceConfig) -> Segments:
    """img2dataset's layout: one image, and its caption in `txt` or in `json` under "caption"."""
    return [only_image(members), Text(read_text(members, "caption"))]


def text(members: Members, source: SourceConfig) -> Segments:
    """Text alone: `txt`, or `json` with "text"."""
    return [Text(read_text(members, "text"))]


def ocr(members: Members, source: SourceConfig) -> Segments:
    """One image and the text in it, in the style that `source.granularity` names (regions.ocr_caption)."""
    return [only_image(members), Text(ocr_caption(read_json(members), source.granularity))]


def grounding(members: Members, source: SourceConfig) -> Segments:
    """One image and a caption with places, in the style that `source.granularity` names (regions.grounding_caption)."""
    return [only_image(members), Text(grounding_caption(read_json(members), source.granularity))]


def interleaved(members: Members, source: SourceConfig) -> Segments:
    """Parallel lists `texts` and `images` in `json`: each slot holds one or the other, null elsewhere.

    A slot with neither (an image that could not be downloaded) is left out.  An
    image is one of these:

    - the name of its member, such as "0.png";
    - its bytes in base64: {"base64": str}, or a `data:` URL;
    - where it came from, as OBELICS and MINT-1T have it: a URL, or an object with
      whatever else.  The k-th image of the list, from 0, is then the member
      `k.jpg` (or another extension), and is left out if there is none.
    """
    content = read_json(members)
    texts, images = content.get("texts"), content.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise SampleError('"texts" and "images" are not two lists of the same length')
    sequence(texts, '"texts"', MAX_SEGMENTS)
    by_stem = {name.rpartition(".")[0]: name for name in image_names(members)}
    segments: Segments = []
    number = 0  # of the image among the list's images
    for slot, (words, entry) in enumerate(zip(texts, images, strict=True)):
        if words is not None and entry is not None:
            raise SampleError(f"slot {slot} holds both a text and an image")
        if words is not None:
            segments.append(Text(string(words, f"texts[{slot}]")))
        elif entry is not None:
            found = _interleaved_image(members, entry, by_stem.get(str(number)), f"images[{slot}]")
            segments += [found] if found else []
            number += 1
    return segments


def conversation(members: Members, source: SourceConfig) -> Segments:
    """Turns in `json` under "conversations" or "conversation", as LLaVA and Mantis have them.

    A turn is {"from" or "role": str, "value" or "content": str}; the roles are
    system, human or user, gpt or assistant: the system's comes first if at all,
    then the user's and the assistant's in turn.  Each `<image>` in a user's text is
    the next image; where no turn has one, the first user turn gets all images at
    its head, each on a line.  The images are those that "image" or "images" names,
    if all are members.  If none is (LLaVA names paths of COCO), as many image members
    are wanted, by number.  Where nothing is named, all image members are shown; there
    may be none.
    """
    content = read_json(members)
    turns = [
        _turn(turn, number)
        for number, turn in enumerate(
            sequence(content.get("conversations", content.get("conversation")), '"conversations"', MAX_TURNS)
        )
    ]
    for number, ((role, _), (following, _)) in enumerate(pairwise(turns)):
        if role == following:
            raise SampleError(f"turns {number} and {number + 1} are both of the {role}")
        if following == "system":
            raise SampleError(f"turn {number + 1} is of the system, which speaks first if at all")
    spoken = [role for role, _ in turns if role != "system"]
    if spoken[:1] == ["assistant"]:
        raise SampleError("the first turn is the assistant's: it answers nothing")
    return _chat(turns, _chat_images(members, content), source)


def preference(members: Members, source: SourceConfig) -> tuple[Segments, Segments]:
    """A better and a worse answer to one prompt: `json` with "prompt", "chosen" and "rejected"; images as above."""
    content = read_json(members)
    prompt, chosen, rejected = (filled(content.get(field), f'"{field}"') for field in ("prompt", "chosen", "rejected"))
    if chosen == rejected:
        raise SampleError('"chosen" and "rejected" are the same')
    images = _chat_images(members, content)
    return tuple(_chat([("user", prompt), ("assistant", answer)], images, source) for answer in (chosen, rejected))


def safety(members: Members, source: SourceConfig) -> Segments:
    """VLGuard's layout: an image, and "instr-resp" in `json`.

    A harmful image comes with {"instruction", "response"}; a harmless one with
    {"safe_instruction", "response"} and {"unsafe_instruction", "response"}.  Both
    exchanges of a harmless one become one conversation, so that its image is
    encoded once; a data set that is to train on them apart writes two samples.
    """
    content = read_json(members)
    turns: list[tuple[Role, str]] = []
    for entry in sequence(content.get("instr-resp"), '"instr-resp"', MAX_TURNS // 2):
        entry = mapping(entry, "an entry of instr-resp")
        asked = [entry[name] for name in ("instruction", "safe_instruction", "unsafe_instruction") if name in entry]
        if len(asked) != 1:
            raise SampleError(f"an entry of instr-resp has {len(asked)} instructions")
        turns.append(("user", filled(asked[0], "an instruction")))
        turns.append(("assistant", filled(entry.get("response"), "a response")))
    return _chat(turns, [only_image(members)], source)


def _schema(function: Callable[[Members, SourceConfig], Any]) -> Schema:
    """Make documents of what one of the functions above finds; its errors say which sample is wrong."""

    def convert(members: Members, source: SourceConfig, key: str) -> tuple[Document, ...]:
        try:
            found = function(members, source)
            rows = {"chosen": found[0], "rejected": found[1]} if function is preference else {"": found}
            return tuple(Document(_checked(row), source.name, key, name) for name, row in rows.items())
        except SampleError as error:
            raise SampleError(error.what, where=f"source {source.name}, key {key}", remedy=error.remedy) from None

    return convert


SCHEMAS: dict[str, Schema] = {
    function.__name__: _schema(function)
    for function in (caption, interleaved, ocr, grounding, conversation, text, preference, safety)
}


def _checked(segments: Segments) -> tuple[Text | Image, ...]:
    if not segments:
        raise SampleError("the sample has neither text nor image")
    if len(segments) > MAX_SEGMENTS:
        raise SampleError(f"the sample has {len(segments)} segments, the limit is {MAX_SEGMENTS}")
    return tuple(segments)


def _interleaved_image(members: Members, entry: Any, numbered: str | None, where: str) -> Image | None:
    """The image that an entry of "images" stands for; `numbered` is the member of its number, if there is one."""
    if isinstance(entry, dict):
        if "base64" in entry:
            return base64_image(string(entry["base64"], f"{where}.base64"), where)
    else:
        name = string(entry, where)
        if name in members:
            return image(members, name)
        if name.startswith("data:"):
            return base64_image(name.partition(",")[2], where)
        if "://" not in name:
            return image(members, name)  # says that there is no such member
    return image(members, numbered) if numbered else None


def _turn(turn: Any, number: int) -> tuple[Role, str]:
    turn = mapping(turn, f"turn {number}")
    role = _ROLES.get(string(turn.get("from", turn.get("role")), f"the role of turn {number}").lower())
    if role is None:
        raise SampleError(f"turn {number} is of none of the roles {', '.join(_ROLES)}")
    return role, filled(turn.get("value", turn.get("content")), f"turn {number}")


def _chat_images(members: Members, content: dict[str, Any]) -> list[Image]:
    """The images that "images" or "image" names, or all, if neither names any.

    Raises:
        SampleError: some of the named ones, or another number of images, are members.
    """
    field = "images" if content.get("images") else "image"
    named = content.get(field) or []
    named = named if isinstance(named, list) else [named]
    found = image_names(members)
    given = [isinstance(name, str) and name in found for name in named]
    if any(given):
        if not all(given):
            absent = named[given.index(False)]
            raise SampleError(f'"{field}" names {str(absent)[:80]!r}, which is no image of the sample, as others are')
        found = named
    elif named and len(named) != len(found):
        raise SampleError(f'"{field}" names {len(named)} images, but {len(found)} are among the members')
    return [image(members, name) for name in found]


def _chat(turns: list[tuple[Role, str]], images: list[Image], source: SourceConfig) -> Segments:
    """Segments of a conversation; only the assistant's words are trained on.

    A turn that begins with an image has an empty text first, which says whose turn it is.
    """
    places = sum(words.count(IMAGE_TOKEN) for role, words in turns if role == "user")
    if places and places != len(images):
        raise SampleError(f"{places} {IMAGE_TOKEN} in the turns, but {len(images)} images in the sample")
    if images and not places:
        for number, (role, words) in enumerate(turns):
            if IMAGE_TOKEN in words:
                raise SampleError(f"{IMAGE_TOKEN} stands in turn {number}, of the {role}, and only users show images")
    if source.system_prompt and turns[0][0] != "system":
        turns = [("system", source.system_prompt), *turns]
    asked = [number for number, (role, _) in enumerate(turns) if role == "user"]
    if not any(role == "assistant" for role, _ in turns):
        raise SampleError("no turn is the assistant's: there is nothing to train on")
    remaining = iter(images)
    segments: Segments = []
    for number, (role, words) in enumerate(turns):
        if asked[:1] == [number] and not places:
            words = f"{IMAGE_TOKEN}\n" * len(images) + words
        first, *others = words.split(IMAGE_TOKEN) if role == "user" else [words]
        segments.append(Text(first, loss=role == "assistant", role=role))
        for piece in others:
            segments.append(next(remaining))
            if piece:
                segments.append(Text(piece, loss=False, role=role))
    return segments
