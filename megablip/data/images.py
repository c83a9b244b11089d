"""From an image file's bytes to the tiles that the vision tower sees.

An image costs one base tile (the whole image squashed) plus the tiles of a
(columns, rows) template chosen by its size: xGen-MM's any-resolution scheme,
which is LLaVA-NeXT's (salesforce/LAVIS, branch xgen-mm, any_res_data_utils.py).

Every image becomes 8-bit RGB: EXIF rotation is applied, transparency is laid
on white, 16-bit grey keeps its high byte, CMYK and palettes are converted,
an animation is its first frame.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image

from megablip.errors import SampleError
from megablip.records import VisualLayout

# What crawls hold. Others of Pillow's formats are rare or hostile (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")

# 8192 x 8192: 200 MB as RGB in a decode worker. Larger is a decompression bomb.
MAX_PIXELS = 2**26

_EXIF_ORIENTATION = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels as displayed, from the header alone.

    Raises:
        SampleError: not an image of a supported format, or too large.
    """
    with _opened(data) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def choose_grid(size: tuple[int, int], grids: Sequence[tuple[int, int]], tile_size: int) -> tuple[int, int]:
    """The (columns, rows) template for an image of `size` = (width, height).

    The one with the most effective pixels (those of the image scaled to fit,
    but never more than it has), then with the least waste, then the first.
    """
    width, height = size

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        canvas_width, canvas_height = grid[0] * tile_size, grid[1] * tile_size
        scale = min(canvas_width / width, canvas_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas_width * canvas_height

    return max(grids, key=merit)  # max keeps the first of equals


def make_tiles(data: bytes, grid: tuple[int, int], layout: VisualLayout) -> tuple[np.ndarray, np.ndarray]:
    """Decode an image and cut it.

    Returns:
        tiles: uint8[1 + columns * rows, 3, S, S]. The base tile, then the crops
            row by row of the image scaled into the template, centred on black.
        patch_mask: bool[1 + columns * rows, P], False where a crop's patch is padding.

    Raises:
        SampleError: truncated, broken, too large, or of an unsupported mode.
    """
    image, side = _decode(data), layout.tile_size
    columns, rows = grid
    canvas = _fit(image, columns * side, rows * side)
    base = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    crops = canvas.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
    tiles = np.concatenate([base.transpose(2, 0, 1)[None], crops])
    return tiles, patch_mask(image.size, grid, layout)


def patch_mask(size: tuple[int, int], grid: tuple[int, int], layout: VisualLayout) -> np.ndarray:
    """bool[1 + columns * rows, P]: True where a patch shows the image.

    The released code's rule: the padding's width is rounded down in patches, so
    a patch that the image's edge crosses counts as image.  A very thin image may
    keep no patch of its crops; the base tile always keeps all.
    """
    columns, rows, n = *grid, layout.patches_per_side
    (width, height), (across, down) = size, (columns * n, rows * n)
    kept = np.zeros((down, across), dtype=bool)
    if width / height > across / down:
        padding = (down - int(height * (across / width))) // 2
        kept[padding : down - padding] = True
    else:
        padding = (across - int(width * (down / height))) // 2
        kept[:, padding : across - padding] = True
    crops = kept.reshape(rows, n, columns, n).transpose(0, 2, 1, 3).reshape(columns * rows, n * n)
    return np.concatenate([np.ones((1, n * n), dtype=bool), crops])


def _fit(image: Image.Image, width: int, height: int) -> np.ndarray:
    """The image scaled to fit and centred on black: uint8[height, width, 3]."""
    scale_x, scale_y = width / image.width, height / image.height
    if scale_x < scale_y:
        fitted = (width, min(math.ceil(image.height * scale_x), height))
    else:
        fitted = (min(math.ceil(image.width * scale_y), width), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(fitted, Image.Resampling.BICUBIC), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    return np.asarray(canvas)


@contextmanager
def _opened(data: bytes):
    """Pillow's lazy image, with whatever Pillow raises turned into SampleError."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if not 0 < image.width * image.height <= MAX_PIXELS:
                raise SampleError(f"the image is {image.width}x{image.height}, the limit is {MAX_PIXELS} pixels")
            yield image
    except SampleError:
        raise
    except Exception as error:  # on broken bytes its decoders raise nearly anything
        # Not the message as it is: Pillow prints the address of the buffer.
        what = "unknown format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise SampleError(f"the image can't be decoded: {what or type(error).__name__}") from None


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 is upright."""
    if image.format == "TIFF" or "exif" not in image.info:
        return 1  # Pillow rotates TIFF itself
    # Not image.getexif(): for PNG it decodes the pixels in search of a later chunk.
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
        orientation = exif.get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block doesn't spoil the pixels
        return 1
    return orientation if orientation in _TRANSPOSITIONS else 1


def _decode(data: bytes) -> Image.Image:
    """Upright RGB image."""
    with _opened(data) as image:
        orientation = _orientation(image)  # before load(), which may find more EXIF in a PNG
        image.load()
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.new("RGB", layer.size, "white")
            image.paste(layer, mask=layer)
        elif image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise SampleError(f"the image has 32 bits a pixel (mode {image.mode}), whose range is unknown")
        image = image.convert("RGB")
        return image.transpose(_TRANSPOSITIONS[orientation]) if orientation != 1 else image
