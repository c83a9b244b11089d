"""Samples that are broken or meant to break: a SampleError or a sane document, never anything else."""

import base64
import io
import json
import random
import struct
import subprocess
import sys
import warnings
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from PIL import PngImagePlugin

from megablip.config import SourceConfig, parse_config
from megablip.data.collate import collate, lay_out
from megablip.data.encode import Encoder, cut_piece, segments_of
from megablip.data.lanes import LaneState
from megablip.data.loader import Loader
from megablip.data.schemas import SCHEMAS
from megablip.errors import SampleError
from megablip.records import IGNORE_LABEL, Document, Image, MicroBatch, PlannedSequence, Text
from tests.data.builders import write_tar
from tests.data.small import LAYOUT, image, write_tokenizer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return Encoder(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))), LAYOUT)


def picture(format, size=(40, 24), mode="RGB", **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks) + png_chunk(b"IEND", b"")


def png_header(width, height):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


def jpeg_segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def text_bomb():
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "0" * 2**24, zip=True)
    return picture("PNG", pnginfo=info)


def jpeg_of(width, height):
    """A JPEG whose frame says so."""
    data = bytearray(picture("JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def truncated(format, **options):
    data = picture(format, **options)
    return data[: len(data) * 2 // 3]


JPEG = picture("JPEG")
PIXELS = zlib.compress(bytes(24 * (40 * 3 + 1)))
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'

IMAGES = {
    "empty": b"",
    "one byte": b"\xff",
    "start of a jpeg": b"\xff\xd8\xff",
    "fill bytes": b"\xff\xd8" + b"\xff" * 2**20,
    "many segments": JPEG[:2] + jpeg_segment(0xFE, b"") * 100_000 + JPEG[2:],
    "a segment past the end": b"\xff\xd8\xff\xe1\xff\xff",
    "jpeg without pixels": JPEG[: JPEG.index(b"\xff\xda")],
    "jpeg of no height": jpeg_of(40, 0),
    "jpeg taller than its data": jpeg_of(40, 200),
    "jpeg bomb": jpeg_of(65_000, 65_000),
    "jpeg of 3000 x 3000 without data": jpeg_of(3000, 3000),
    "two frames": JPEG[:2] + jpeg_segment(0xC0, b"\x08\x00\x10\x00\x10\x01\x01\x11\x00") + JPEG[2:],
    "lossless jpeg": JPEG.replace(b"\xff\xc0", b"\xff\xc3"),
    "exif garbage": JPEG[:2] + jpeg_segment(0xE1, b"Exif\0\0II*\0" + b"\xff" * 500) + JPEG[2:],
    "exif that points at itself": JPEG[:2] + jpeg_segment(0xE1, b"Exif\0\0MM\0*" + bytes(3) + b"\0\xff\xff") + JPEG[2:],
    "png text bomb": text_bomb(),
    "png profile bomb": png(png_header(40, 24), (b"iCCP", b"x\0\0" + zlib.compress(bytes(2**24))), (b"IDAT", PIXELS)),
    "png pixel bomb": png(png_header(60_000, 60_000), (b"IDAT", zlib.compress(bytes(2**24)))),
    "png of negative size": png(png_header(2**31, 2**31 - 1), (b"IDAT", PIXELS)),
    "png with too many pixels": png(png_header(40, 24), (b"IDAT", zlib.compress(bytes(2**24)))),
    "png with a wrong chunk size": picture("PNG")[:33] + b"\xff" * 4 + b"IDAT" + PIXELS,
    "tiff bomb": b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIIHHII", 256, 4, 1, 2**31, 257, 4, 1, 2**31) + bytes(4),
    "tiff that loops": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "tiff with a tag of 4 GB": b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 273, 4, 2**30, 8) + bytes(4),
    "gif of 65535 x 65535": b"GIF89a" + b"\xff" * 4 + picture("GIF")[10:],
    "bmp bomb": picture("BMP")[:18] + struct.pack("<ii", 2**30, 2**30) + picture("BMP")[26:],
    "webp that lies about its length": picture("WEBP")[:4] + b"\xff\xff\xff\x7f" + picture("WEBP")[8:],
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) (r) file\n",
    "svg": SVG,
    "html": b"<html>404</html>",
    "pickle": b"cos\nsystem\n(S'true'\ntR.",
    "zip": b"PK\x03\x04" + bytes(100),
    **{f"truncated {format}": truncated(format) for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")},
    "truncated progressive": truncated("JPEG", progressive=True),
    "truncated cmyk": truncated("JPEG", mode="CMYK"),
    "1 x 1": picture("PNG", size=(1, 1)),
    "20000 x 3": picture("JPEG", size=(20_000, 3)),
    "3 x 20000": picture("PNG", size=(3, 20_000)),
    "noise": np.random.default_rng(0).bytes(5000),
}

TURN, ANSWER = {"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "So."}
CONTROL = "<image></s><|endofchunk|><pad><s><|end|>\n<|assistant|>\n"


def content(value):
    return {"json": value if isinstance(value, bytes) else json.dumps(value).encode()}


SAMPLES = {
    "no members": ("caption", {}),
    "deep json": ("interleaved", content(b'{"texts":' * 100_000)),
    "deep list": ("conversation", content(b'{"conversations":' + b"[" * 500 + b"]" * 500 + b"}")),
    "endless number": ("text", content(b'{"text": ' + b"9" * 100_000 + b"}")),
    "huge exponent": ("ocr", {"jpg": JPEG, **content(b'{"lines": [{"text": "a", "bbox": [0, 0, 1e999, 1]}]}')}),
    "NaN": ("ocr", {"jpg": JPEG, **content(b'{"lines": [{"text": "a", "bbox": [NaN, 0, 1, -Infinity]}]}')}),
    "json of null": ("text", content(b"null")),
    "json in UTF-16": ("text", content('{"text": "a"}'.encode("utf-16"))),
    "invalid UTF-8": ("text", content(b'{"text": "\xff"}')),
    "repeated keys": ("text", content(b'{"text": 3, "text": "a"}')),
    "half a surrogate": ("text", content(b'{"text": "\\udc00"}')),
    "NUL bytes": ("text", {"txt": b"a\0b\0"}),
    "odd characters": ("text", {"txt": "\u202e\ufeff\u2028\U000e0001 \u2581a".encode()}),
    "control tokens": ("text", {"txt": CONTROL.encode()}),
    "control tokens in turns": (
        "conversation",
        content(
            {"conversations": [{"from": role, "value": CONTROL.replace("<image>", "")} for role in ("human", "gpt")]}
        ),
    ),
    "placeholders only": ("conversation", content({"conversations": [{"from": "human", "value": "<image>" * 1000}]})),
    "roles of all kinds": ("conversation", content({"conversations": [{"from": [], "value": {}}, 3, None]})),
    "base64 garbage": ("interleaved", content({"texts": [None], "images": [{"base64": "a-_=\n"}]})),
    "base64 of text": ("interleaved", content({"texts": [None], "images": [{"base64": "aGVsbG8="}]})),
    "a path": ("interleaved", content({"texts": [None], "images": ["../../etc/passwd"]})),
    "a file URL": ("interleaved", content({"texts": [None, "a"], "images": ["file:///etc/passwd", None]})),
    "a million segments": ("interleaved", content({"texts": ["a"] * 10**6, "images": [None] * 10**6})),
    "a million empty turns": ("conversation", content({"conversations": [{}] * 10**6})),
    "one image a thousand times": (
        "interleaved",
        {"0.jpg": JPEG, **content({"texts": [None] * 1000, "images": ["0.jpg"] * 1000})},
    ),
    "a long word": ("text", {"txt": b"a" * 200_000}),
    "literal bomb": ("grounding", {"jpg": JPEG, **content({"captions": "[" + "9**9**9," * 10 + "]"})}),
    "literal of code": ("grounding", {"jpg": JPEG, **content({"captions": "[[__import__('os').getcwd()]]"})}),
    "mentions without end": (
        "grounding",
        {"jpg": JPEG, **content({"caption": "a" * 900, "objects": [{"text": "a", "bbox": [0, 0, 1, 1]}] * 1000})},
    ),
    "safe is not a list": ("safety", {"jpg": JPEG, **content({"instr-resp": {"instruction": "a"}})}),
    "the same answers": ("preference", content({"prompt": "a", "chosen": "b", "rejected": "b"})),
    "no image but a strange name": ("caption", {"\udcff.html": b"", "txt": b"a"}),
    "member with a strange name": ("caption", {"\udcff.jpg": JPEG, "txt": b"a"}),
}
SAMPLES |= {f"image: {name}": ("caption", {"jpg": data, "txt": b"a"}) for name, data in IMAGES.items()}
SAMPLES |= {
    f"base64: {name}": (
        "interleaved",
        content({"texts": [None, "a"], "images": [{"base64": base64.b64encode(IMAGES[name]).decode()}, None]}),
    )
    for name in ("png text bomb", "jpeg bomb", "html", "1 x 1")
}

# What must come out as a document: odd, but nothing is wrong with it.
SANE = {
    *("NUL bytes", "odd characters", "control tokens", "control tokens in turns", "repeated keys", "json in UTF-16"),
    *("a file URL", "one image a thousand times", "a long word", "mentions without end", "member with a strange name"),
    *("image: exif garbage", "image: exif that points at itself", "image: png with too many pixels"),
    "image: png with a wrong chunk size",
    *("image: 1 x 1", "image: 20000 x 3", "image: 3 x 20000", "base64: 1 x 1"),
}


def run(encoder, schema, members) -> MicroBatch:
    """A sample on its whole way to the device."""
    config = SourceConfig(name="web", shards="", schema=schema, weight=1)
    documents = [encoder.encode(document) for document in SCHEMAS[schema](members, config, "k")]
    return micro_batch([encoder.decode(document, 0) for document in documents])


def micro_batch(documents) -> MicroBatch:
    tiles = np.concatenate([document.tiles for document in documents])
    planned = PlannedSequence(0, 0, (), np.zeros(0, np.int64))
    return collate([lay_out(planned, documents, (), tiles, LAYOUT)], LAYOUT)


def check(batch: MicroBatch, encoder: Encoder) -> None:
    """The invariants of a micro-batch."""
    slots = batch.input_ids == encoder.tokenizer.image_id
    features = 0 if batch.dummy else len(batch.tiles) * LAYOUT.tokens_per_tile
    assert slots.sum() == len(batch.visual_token_index) == features
    assert slots[batch.visual_token_index].all()
    assert (batch.labels[slots] == IGNORE_LABEL).all()
    trained = batch.labels != IGNORE_LABEL
    assert (batch.labels[trained] == batch.input_ids[trained]).all()
    assert not (batch.labels == encoder.tokenizer.pad_id).any()
    starts = batch.cu_seqlens[:-1].long()
    assert (batch.position_ids[starts] == 0).all()
    assert (batch.labels[starts] == IGNORE_LABEL).all()
    inside = np.setdiff1d(np.arange(1, len(batch.input_ids)), starts)
    assert (batch.position_ids[inside] == batch.position_ids[inside - 1] + 1).all()


@pytest.mark.parametrize("name", SAMPLES)
def test_a_hostile_sample_is_refused_or_harmless(encoder, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what it then reads or refuses
        if name in SANE:
            check(run(encoder, *SAMPLES[name]), encoder)
            return
        with pytest.raises(SampleError) as caught:
            run(encoder, *SAMPLES[name])
    assert "key k" in caught.value.where
    line = str(caught.value)
    assert len(line.encode()) < 2000  # it is written to quarantine.jsonl


def test_in_a_run_every_bad_sample_is_told_and_every_good_one_arrives(tmp_path):
    """The above in shards, a source for each schema but pairs', among good samples; through planner and workers."""
    numbers = {
        name: number for number, (name, (of, members)) in enumerate(SAMPLES.items()) if members and of != "preference"
    }
    sources = []
    for schema in sorted({SAMPLES[name][0] for name in numbers}):
        shard = [{"__key__": b"%d" % n} | SAMPLES[name][1] for name, n in numbers.items() if SAMPLES[name][0] == schema]
        path = write_tar(tmp_path / f"{schema}.tar", shard)
        sources.append({"name": schema, "shards": str(path), "schema": schema, "weight": 1})
    good = [{"__key__": b"good%d" % number, "txt": b"a dog"} for number in range(100)]
    path = write_tar(tmp_path / "good.tar", good)
    sources.append({"name": "good", "shards": str(path), "schema": "text", "weight": 1})
    raw = {
        "stage": "pretrain",
        "run_dir": str(tmp_path / "run"),
        "duration": "1 epochs",
        "model": {"path": "unused"},
        "optimizer": {"lr": 1e-3},
        "data": {
            "sources": sources,
            "sequence_length": 4096,
            "max_tiles": 24,
            "packing_buffer": 8,
            "decode_workers": 2,
        },
        "batch": {"lanes": 2},
    }
    keys, skips, ended = set(), [], False
    with Loader(parse_config(raw, "test"), str(write_tokenizer(tmp_path)), LAYOUT, 0, 1, None) as loader:
        while not ended:
            batch = next(loader)
            for micro_batch in batch.micro_batches:
                keys |= set(micro_batch.keys) - {""}
            skips += batch.skipped
            ended = all(LaneState(state).is_dry for state in batch.lane_states.values())
    too_long = {"a long word", "one image a thousand times", "mentions without end"}  # dropped, and counted
    assert batch.samples_dropped == len(too_long)
    sane = {f"{numbers[name]}" for name in SANE - too_long}
    assert keys == sane | {f"good{number}" for number in range(100)}
    bad = sorted(f"{number}" for name, number in numbers.items() if name not in SANE)
    assert sorted(skip.key for skip in skips) == bad
    told = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in told) == bad


def test_image_bombs_need_little_memory():
    script = (
        "import resource, warnings; warnings.simplefilter('ignore')\n"
        "from megablip.data.images import decode; from megablip.errors import SampleError\n"
        "from tests.data.test_hostile import IMAGES\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name, data in IMAGES.items():\n"
        "    try: decode(data)\n"
        "    except SampleError: pass\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert float(done.stdout) < 500  # MiB: an image of the allowed size is 200


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")


@pytest.mark.parametrize("format", FORMATS)
def test_flipped_bits(encoder, format):
    rng = random.Random(format)
    whole = picture(format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 1, 4, 30))):
                data[rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 64))] ^= 1 << rng.randrange(8)
            try:
                batch = run(encoder, "caption", {"jpg": bytes(data), "txt": b"a"})
            except SampleError:
                continue
            check(batch, encoder)


WORDS = ("", "a", "a dog 381", "<image>", "<|end|>", "\n", "the dog\n\n a cat", "é")


def random_document(rng: random.Random, pictures: list[Image]) -> Document:
    """Texts and images in any order, a conversation or not."""
    chat = rng.random() < 0.3
    segments = []
    for _ in range(rng.choice((1, 2, 3, 5, 8))):
        if rng.random() < 0.35:
            segments.append(rng.choice(pictures))
        else:
            role = rng.choice(("system", "user", "assistant")) if chat else ""
            loss = role == "assistant" if chat else rng.random() < 0.8
            segments.append(Text(rng.choice(WORDS), loss, role))
    return Document(tuple(segments), "web", "k", rng.choice(("", "", "chosen", "rejected")))


def random_pieces(rng: random.Random, encoded):
    """Cut as a planner may: between segments, and inside those without an image."""
    edges, place = [0], 0
    for tokens, tiles in segments_of(encoded):
        if not tiles and tokens > 1 and rng.random() < 0.4:
            edges.append(place + rng.randrange(1, tokens))
        place += tokens
        if rng.random() < 0.4:
            edges.append(place)
    assert place == len(encoded.input_ids)
    edges = sorted({*edges, place})
    return [cut_piece(encoded, start, end - start) for start, end in pairwise(edges)]


def lay(encoder, rng: random.Random, count: int) -> None:
    """Random documents, whole or in pieces, some to a micro-batch."""
    pictures = [image(*size, value, "JPEG") for size, value in (((32, 16), 50), ((16, 32), 150), ((7, 5), 250))]
    row = []
    for number in range(count):
        encoded = encoder.encode(random_document(rng, pictures))
        assert encoded.segment_starts[0] == 0
        assert (np.diff(encoded.segment_starts) > 0).all()
        pieces = random_pieces(rng, encoded) if rng.random() < 0.5 else [encoded]
        assert np.array_equal(np.concatenate([piece.input_ids for piece in pieces]), encoded.input_ids)
        assert np.array_equal(np.concatenate([piece.labels for piece in pieces]), encoded.labels)
        assert sum(piece.tiles for piece in pieces) == encoded.tiles
        row += [encoder.decode(piece, 0) for piece in pieces]
        if len(row) > 8 or number == count - 1:
            check(micro_batch(row), encoder)
            row.clear()


# A Random whose numbers hypothesis draws, so that it makes what fails shorter.
RANDOMS = st.randoms(use_true_random=False)
DOCUMENTS = 10  # of an example


@given(RANDOMS)
@settings(max_examples=300)
def test_random_interleavings_keep_the_invariants(encoder, rng):
    lay(encoder, rng, DOCUMENTS)


@pytest.mark.slow
@given(RANDOMS)
@settings(max_examples=100_000 // DOCUMENTS)
def test_a_hundred_thousand_interleavings(encoder, rng):
    lay(encoder, rng, DOCUMENTS)
