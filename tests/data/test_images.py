"""Any-resolution tiles against the reference, and the fate of odd and hostile images."""

import contextlib
import io
import json
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from megablip.data import images
from megablip.data.images import NO_GRID, choose_grid, decode, image_size, make_tiles, patch_mask
from megablip.errors import SampleError
from megablip.records import VisualLayout

REFERENCE = Path(__file__).parents[1] / "fixtures" / "xgen_mm_reference"
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
LAYOUT = VisualLayout(tile_size=32, patch_size=8, tokens_per_tile=8, grids=GRIDS)

# What Pillow does to show an image of an EXIF orientation upright.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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

    grid = choose_grid(image_size(data), layout)
    tiles, mask = make_tiles(data, grid, layout)

    # The reference resized with Pillow, and its images are harsh: edges of pure colours.
    difference = np.abs(tiles - np.rint((expected[f"{case}.tiles"] + 1) * 127.5))
    assert difference.max() <= 2
    assert difference.mean() <= 0.06
    # The released code lays the crops' patches out as one map and cuts it into full-width strips.
    (columns, rows), n = grid, layout.patches_per_side
    strips = mask[1:].reshape(rows, columns, n, n).transpose(0, 2, 1, 3).reshape(rows * columns, n * n)
    assert np.array_equal(np.concatenate([mask[:1], strips]), expected[f"{case}.mask"].astype(bool))


FULL = VisualLayout(tile_size=384, patch_size=14, tokens_per_tile=128, grids=GRIDS)
TWELVE = tuple((c, r) for c in range(1, 13) for r in range(1, 13) if c * r <= 12)


@pytest.mark.parametrize(
    ("size", "released", "paper", "twelve"),
    [
        # Effective pixels and waste of (2, 2): 307,200 and 282,624; of (2, 1): 196,608 and 98,304.
        ((640, 480), (2, 2), (2, 1), (2, 2)),
        ((384, 384), (1, 2), (1, 2), (1, 1)),  # two templates equally good: the first listed
        ((10, 10), (1, 2), (1, 2), (1, 1)),
        ((1, 1), (1, 2), (1, 2), (1, 1)),
        ((768, 768), (2, 2), (2, 2), (2, 2)),
        ((2000, 500), (3, 1), (3, 1), (6, 2)),
        ((500, 2000), (1, 3), (1, 3), (2, 6)),
        ((4000, 3000), (2, 2), (2, 1), (4, 3)),
        ((20000, 3), (1, 2), (1, 2), (1, 1)),  # scaled to less than a pixel's height all are equally useless
    ],
)
def test_choose_grid(size, released, paper, twelve):
    assert choose_grid(size, FULL) == released
    assert choose_grid(size, replace(FULL, grid_rule="paper")) == paper
    assert choose_grid(size, replace(FULL, grids=TWELVE)) == twelve


def test_without_templates_there_is_the_base_tile():
    layout = replace(LAYOUT, grids=())
    for rule in ("released", "paper"):
        assert choose_grid((640, 480), replace(layout, grid_rule=rule)) == NO_GRID
    data = encoded(gradient(96, 32))
    tiles, mask = make_tiles(data, NO_GRID, layout)
    assert layout.tiles(NO_GRID) == len(tiles) == len(mask) == 1
    assert np.array_equal(tiles[0], make_tiles(data, (3, 1), LAYOUT)[0][0])
    assert mask.all()


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_choose_grid_is_the_published_rule(width, height):
    best, most, least = None, 0, float("inf")
    for columns, rows in GRIDS:
        scale = min(columns * 384 / width, rows * 384 / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = columns * rows * 384**2 - effective
        if effective > most or (effective == most and waste < least):
            best, most, least = (columns, rows), effective, waste
    assert choose_grid((width, height), FULL) == best


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_the_papers_rule_wastes_least(width, height):
    def waste(grid):
        scale = min(grid[0] * 384 / width, grid[1] * 384 / height)
        return grid[0] * grid[1] * 384**2 - min(int(width * scale) * int(height * scale), width * height)

    layout = replace(FULL, grids=TWELVE, grid_rule="paper")
    assert waste(choose_grid((width, height), layout)) == min(map(waste, TWELVE))


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
    stored = upright.transpose(TRANSPOSITIONS[inverse]) if orientation > 1 else upright
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


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_sizes_need_no_torch(format, tmp_path):
    """The planner reads them, and torch is 2 s and 200 MB."""
    path = tmp_path / "image"
    path.write_bytes(encoded(gradient(30, 20), format))
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from megablip.data.images import image_size\n"
        "assert image_size(open(sys.argv[1], 'rb').read()) == (30, 20)"
    )
    subprocess.run([sys.executable, "-c", script, path], check=True, cwd=REFERENCE.parents[2])


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


@pytest.mark.parametrize("size", [1, 2])  # bytes of a level
def test_the_level_of_grey_that_is_transparent_is_white(size):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    levels = np.array([0x12, 0x80, 0xFF, 0x00, 0x13], np.uint8)
    row = levels.repeat(size).tobytes()
    data = b"\x89PNG\r\n\x1a\n"
    data += chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 1, 8 * size, 0, 0, 0, 0))
    data += chunk(b"tRNS", struct.pack(">H", 0x1212 if size == 2 else 0x12))
    data += chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    assert decode(data)[0, :, 0].tolist() == [0xFF, 0x80, 0xFF, 0x00, 0x13]


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("white", "black")]
    tiles, _ = make_tiles(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), (1, 2), LAYOUT)
    assert (tiles[0] == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (20000, 3), (3, 20000)])
def test_extreme_shapes_have_tiles(size):
    data = encoded(Image.new("RGB", size, "white"))
    grid = choose_grid(image_size(data), LAYOUT)
    tiles, mask = make_tiles(data, grid, LAYOUT)
    assert len(tiles) == len(mask) == LAYOUT.tiles(grid)
    assert tiles[1:].max() == 255  # something of it is to be seen in the crops


def photo(width, height, seed=0):
    """Smooth noise: a spectrum like a photograph's."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(96, 96), (200, 150), (33, 500), (20, 10)])
def test_the_base_tile_is_pillows(size):
    image = photo(*size)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    tiles, _ = make_tiles(encoded(image), (1, 2), LAYOUT)
    assert np.abs(tiles[0].transpose(1, 2, 0) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{"quality": 90}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}]
)
def test_jpegs_decode_as_pillow_decodes_them(mode, options):
    data = encoded(photo(75, 41).convert(mode), "JPEG", **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(decode(data) - expected).max() <= 1


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("at_least", "factor"),
    [((400, 300), 1), ((321, 10), 2), ((10, 240), 2), ((160, 120), 4), ((161, 1), 2), ((80, 60), 8), ((1, 1), 8)],
)
def test_dct_scaling_halves_no_further_than_asked(orientation, at_least, factor):
    """Of an image of 643 x 481 pixels, whose half, quarter and eighth are rounded up."""
    upright = photo(643, 481)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else upright
    data = encoded(stored, "JPEG", exif=exif)
    pixels = decode(data, at_least=at_least)
    assert pixels.shape == (-(-481 // factor), -(-643 // factor), 3)


@pytest.mark.parametrize("grid", [(2, 2), (3, 1), (1, 3), NO_GRID])
def test_dct_scaling_changes_pixels_little_and_the_mask_not_at_all(grid):
    data = encoded(photo(40, 30).resize((640, 480), Image.Resampling.BICUBIC), "JPEG", quality=95)
    exact, mask = make_tiles(data, grid, LAYOUT)
    scaled, scaled_mask = make_tiles(data, grid, LAYOUT, dct_scaling=True)
    assert np.array_equal(mask, scaled_mask)
    assert not np.array_equal(exact, scaled)
    assert np.abs(exact.astype(int) - scaled).max() <= 3


def test_tiles_are_written_where_the_caller_says():
    data = encoded(photo(100, 20), "JPEG")
    expected, _ = make_tiles(data, (2, 2), LAYOUT)
    out = np.full((7, 3, 32, 32), 99, np.uint8)
    tiles, _ = make_tiles(data, (2, 2), LAYOUT, out=out[1:6])
    assert np.shares_memory(tiles, out)
    assert np.array_equal(out[1:6], expected)
    assert (out[[0, 6]] == 99).all()


def jpeg_segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def exif_block(order="<", tag=0x0112, kind=3, count=1, value=6, directory=8):
    magic = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHIHH", tag, kind, count, value, 0)
    return b"Exif\0\0" + magic + struct.pack(order + "IH", directory, 1) + entry


@pytest.mark.parametrize(
    ("segments", "rotated"),
    [
        (b"", False),
        (jpeg_segment(0xE1, exif_block()), True),
        (jpeg_segment(0xE1, exif_block(order=">")), True),
        (b"\xff\xd0\xff\x01" + jpeg_segment(0xE1, exif_block()), True),  # markers without a length
        (b"\xff" * 50 + jpeg_segment(0xE1, exif_block()), True),  # fill bytes
        (jpeg_segment(0xFE, b"\xff\xc0 a frame?") + jpeg_segment(0xE1, exif_block()), True),
        (jpeg_segment(0xE1, exif_block(value=9)), False),
        (jpeg_segment(0xE1, exif_block(value=0)), False),
        (jpeg_segment(0xE1, exif_block(kind=7)), False),
        (jpeg_segment(0xE1, exif_block(count=2**32 - 1)), False),
        (jpeg_segment(0xE1, exif_block(directory=2**32 - 1)), False),
        (jpeg_segment(0xE1, exif_block()[:20]), False),
        (jpeg_segment(0xE1, b"Exif\0\0garbage"), False),
        (jpeg_segment(0xE1, b""), False),
    ],
)
def test_jpeg_headers(segments, rotated):
    jpeg = encoded(gradient(40, 24), "JPEG")
    data = jpeg[:2] + segments + jpeg[2:]
    assert image_size(data) == ((24, 40) if rotated else (40, 24))
    assert decode(data).shape == ((40, 24, 3) if rotated else (24, 40, 3))


@pytest.mark.parametrize("size", [(20, 12), (50, 30)])
def test_a_header_that_lies_bounds_the_decoder(monkeypatch, size):
    """simplejpeg allots what libjpeg finds; it must not be more than what was checked."""
    data = encoded(gradient(40, 24), "JPEG")
    monkeypatch.setattr(images, "_jpeg_header", lambda data: (*size, 1))
    with pytest.raises(SampleError, match="header says {}x{}".format(*size)):
        decode(data)


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
            make_tiles(bytes(content), choose_grid(image_size(bytes(content)), LAYOUT), LAYOUT)


@pytest.mark.parametrize("size", [(40, 24), (16, 16), (7, 300), (1, 1)])
def test_tiles_are_written_as_torch_interpolates_them(size):
    """The operator under `interpolate` that takes a place to write to gives the same pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = images.empty_tiles(3, 16)
    out[:] = 7
    images._resize(pixels, out[1])
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, (16, 16), mode="bicubic", antialias=True)[0]
    assert (out[1] == expected.numpy()).all()
    assert (out[[0, 2]] == 7).all()
