"""Any-resolution tiles against the reference, and the fate of odd and hostile images."""

import contextlib
import io
import json
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from megablip.data import images
from megablip.data.images import choose_grid, image_size, make_tiles, patch_mask
from megablip.errors import SampleError
from megablip.records import VisualLayout

REFERENCE = Path(__file__).parents[1] / "fixtures" / "xgen_mm_reference"
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
LAYOUT = VisualLayout(tile_size=32, patch_size=8, tokens_per_tile=8, grids=GRIDS)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels).convert(mode)


def reference_images():
    cases = json.loads((REFERENCE / "reference.json").read_text())["cases"]
    return [(f"{c}.{k}", name) for c, case in enumerate(cases) for k, name in enumerate(case["images"])]


@pytest.mark.parametrize(("case", "name"), reference_images())
def test_tiles_and_mask_equal_the_reference(case, name):
    expected = load_file(REFERENCE / "cases.safetensors")
    grids_wh = json.loads((REFERENCE / "reference.json").read_text())["grids_wh"]
    layout = VisualLayout(32, 8, 8, tuple((w // 32, h // 32) for w, h in grids_wh))
    data = (REFERENCE / name).read_bytes()

    grid = choose_grid(image_size(data), layout.grids, layout.tile_size)
    tiles, mask = make_tiles(data, grid, layout)

    assert np.array_equal(tiles, np.rint((expected[f"{case}.tiles"] + 1) * 127.5))
    # The released code lays the crops' patches out as one map and cuts it into full-width strips.
    (columns, rows), n = grid, layout.patches_per_side
    strips = mask[1:].reshape(rows, columns, n, n).transpose(0, 2, 1, 3).reshape(rows * columns, n * n)
    assert np.array_equal(np.concatenate([mask[:1], strips]), expected[f"{case}.mask"].astype(bool))


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((640, 480), (2, 2)),
        ((384, 384), (1, 2)),  # two templates equally good: the first listed
        ((10, 10), (1, 2)),
        ((1, 1), (1, 2)),
        ((2000, 500), (3, 1)),
        ((500, 2000), (1, 3)),
        ((20000, 3), (1, 2)),  # scaled to less than a pixel's height all templates are equally useless
    ],
)
def test_choose_grid(size, grid):
    assert choose_grid(size, GRIDS, 384) == grid


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_choose_grid_is_the_published_rule(width, height):
    best, most, least = None, 0, float("inf")
    for columns, rows in GRIDS:
        scale = min(columns * 384 / width, rows * 384 / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = columns * rows * 384**2 - effective
        if effective > most or (effective == most and waste < least):
            best, most, least = (columns, rows), effective, waste
    assert choose_grid((width, height), GRIDS, 384) == best


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(GRIDS))
def test_padding_is_black_and_masked(width, height, grid):
    tiles, mask = make_tiles(encoded(Image.new("RGB", (width, height), "white"), "BMP"), grid, LAYOUT)
    assert tiles.shape == (LAYOUT.tiles(grid), 3, 32, 32)
    assert mask.shape == (LAYOUT.tiles(grid), 16)
    assert mask[0].all()
    assert (tiles[0] == 255).all()
    patches = tiles.reshape(-1, 3, 4, 8, 4, 8).max(axis=(1, 3, 5)).reshape(-1, 16)
    assert not (mask & (patches == 0))[mask.any(axis=1)].any()  # no kept patch is all padding
    assert np.array_equal(mask, patch_mask((width, height), grid, LAYOUT))


def test_crops_are_row_major():
    image = Image.new("RGB", (64, 64))
    for number, corner in enumerate([(0, 0), (32, 0), (0, 32), (32, 32)]):
        image.paste((number + 1,) * 3, (*corner, corner[0] + 32, corner[1] + 32))
    tiles, mask = make_tiles(encoded(image), (2, 2), LAYOUT)
    assert [tile.max() for tile in tiles[1:]] == [1, 2, 3, 4]
    assert mask.all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation(orientation, format):
    upright = gradient(96, 32)
    inverse = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    stored = upright.transpose(images._TRANSPOSITIONS[inverse]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    assert image_size(data) == (96, 32)
    tiles, _ = make_tiles(data, (3, 1), LAYOUT)
    crops = tiles[1:].transpose(2, 0, 3, 1).reshape(32, 96, 3)
    tolerance = 8 if format == "JPEG" else 0
    assert np.abs(crops.astype(int) - np.asarray(upright)).max() <= tolerance


def test_size_is_read_from_the_header_alone(monkeypatch):
    def refuse(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    assert image_size(encoded(gradient(30, 20))[:100]) == (30, 20)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = gradient(64, 32, "L")
    image = Image.fromarray(np.asarray(image) * np.uint16(257)) if mode == "I;16" else image.convert(mode)
    tiles, _ = make_tiles(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), (2, 1), LAYOUT)
    if mode != "1":
        expected = np.asarray(gradient(64, 32, "L")).astype(int)
        found = tiles[1:].transpose(2, 0, 3, 1).reshape(32, 64, 3).astype(int)
        assert np.abs(found - expected[..., None]).max() <= (4 if mode == "P" else 1)


def test_transparency_is_white():
    tiles, _ = make_tiles(encoded(Image.new("RGBA", (32, 32), (200, 0, 0, 0))), (1, 2), LAYOUT)
    assert (tiles[0] == 255).all()
    palette = Image.new("P", (32, 32), 0)
    tiles, _ = make_tiles(encoded(palette, "PNG", transparency=0), (1, 2), LAYOUT)
    assert (tiles[0] == 255).all()


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("white", "black")]
    tiles, _ = make_tiles(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), (1, 2), LAYOUT)
    assert (tiles[0] == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (20000, 3), (3, 20000)])
def test_extreme_shapes_have_tiles(size):
    data = encoded(Image.new("RGB", size, "white"))
    grid = choose_grid(image_size(data), GRIDS, 32)
    tiles, mask = make_tiles(data, grid, LAYOUT)
    assert len(tiles) == len(mask) == LAYOUT.tiles(grid)
    assert tiles[1:].max() == 255  # something of it is to be seen in the crops


def broken_samples():
    png, jpeg = encoded(gradient(64, 64)), encoded(gradient(64, 64), "JPEG")
    ihdr = struct.pack(">4sIIBBBBB", b"IHDR", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = png[:8] + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + png[33:]
    return {
        "empty": b"",
        "text": b"<html>404</html>",
        "truncated png": png[: len(png) // 2],
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "bomb": bomb,
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "float": encoded(Image.new("F", (8, 8)), "TIFF"),
    }


@pytest.mark.parametrize("name", broken_samples())
def test_broken_images_are_sample_errors(name):
    data = broken_samples()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(SampleError) as caught:
            make_tiles(data, (1, 2), LAYOUT)
    assert "0x" not in str(caught.value)


def test_too_many_pixels_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(SampleError, match="limit is 100 pixels"):
        image_size(encoded(gradient(11, 10)))
    assert image_size(encoded(gradient(10, 10))) == (10, 10)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_bytes_never_escape_as_other_errors(data):
    format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]))
    content = bytearray(encoded(gradient(40, 24), format))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(SampleError):
            make_tiles(bytes(content), choose_grid(image_size(bytes(content)), GRIDS, 32), LAYOUT)
