"""From an image file's bytes to the tiles that the vision tower sees.

An image costs one base tile (the whole image squashed) plus the tiles of a
(columns, rows) template chosen by its size: any-resolution encoding.  A layout
without templates gives the base tile alone, the fixed resolution of BLIP-3's
first pre-training stage; the grid of such an image is NO_GRID.

Every image becomes 8-bit RGB: EXIF rotation is applied, transparency is laid
on white, 16-bit grey keeps its high byte, CMYK and palettes are converted, an
animation is its first frame.  libjpeg-turbo decodes JPEG, by way of simplejpeg;
Pillow decodes the rest, and the JPEGs that libjpeg-turbo warns about.  torch
resizes: on photographs its antialiased bicubic of bytes is Pillow's to within
one level (on noise, where bicubic overshoots and is clipped, a few pixels in a
thousand differ by more), and it is several times faster.  Reading sizes needs
no torch.
"""

from __future__ import annotations

import io
import math
import re
import struct
from contextlib import contextmanager

import numpy as np
from PIL import Image

from megablip.errors import SampleError
from megablip.records import VisualLayout

try:
    import simplejpeg
except ImportError:  # megablip requires it; code that goes with an export does with Pillow, which is slower
    simplejpeg = None

# What crawls hold. Others of Pillow's formats are rare or hostile (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")

# 8192 x 8192: 200 MB as RGB in a decode worker. Larger is a decompression bomb.
MAX_PIXELS = 2**26

JPEG_START = b"\xff\xd8\xff"
NO_GRID = (0, 0)

_JPEG_MARKER = re.compile(rb"\xff[\x01-\xfe]")  # bytes of 0xFF may fill the space before it
_JPEG_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}  # TEM, RST0 to RST7, SOI
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15: these three are other segments
_JPEG_SCAN, _JPEG_END, _JPEG_EXIF = 0xDA, 0xD9, 0xE1
_MAX_JPEG_SEGMENTS = 1000  # before the frame; a camera writes some dozens

_LOST_PIXELS = re.compile("premature end|bad Huffman code", re.IGNORECASE)

_EXIF_ORIENTATION = 0x0112


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels as displayed, from the header alone.

    Raises:
        SampleError: not an image of a supported format, or too large.
    """
    if data.startswith(JPEG_START):
        width, height, orientation = _jpeg_header(data)
    else:
        with _opened(data) as image:
            (width, height), orientation = image.size, _pillow_orientation(image)
    return (height, width) if orientation >= 5 else (width, height)


def choose_grid(size: tuple[int, int], layout: VisualLayout) -> tuple[int, int]:
    """The (columns, rows) template of the layout for an image of `size` = (width, height).

    A template's effective pixels are those of the image scaled to fit, but
    never more than the image has; the rest of its pixels are waste.

    released: most effective pixels, then least waste.  LLaVA-NeXT's rule, which
    xGen-MM's released weights were trained with (salesforce/LAVIS, branch
    xgen-mm, any_res_data_utils.py).
    paper: least waste, then most effective pixels, so small images get small
    templates.  The paper (arXiv 2408.08872) describes any-resolution encoding
    in words; this formula is our reading of them.

    Among equals the first listed wins.
    """
    width, height = size

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        canvas_width, canvas_height = grid[0] * layout.tile_size, grid[1] * layout.tile_size
        scale = min(canvas_width / width, canvas_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        unwasted = effective - canvas_width * canvas_height
        return (effective, unwasted) if layout.grid_rule == "released" else (unwasted, effective)

    return max(layout.grids, key=merit, default=NO_GRID)  # max keeps the first of equals


def empty_tiles(count: int, side: int) -> np.ndarray:
    """uint8[count, 3, side, side] of any content, to be filled with tiles."""
    return as_tiles(np.empty(count * 3 * side * side, np.uint8), side)


def as_tiles(memory: np.ndarray, side: int) -> np.ndarray:
    """A view, uint8[count, 3, side, side], of count * 3 * side * side bytes.

    In memory a pixel's three bytes lie side by side, as the decoder and the resizer have them (torch's
    `channels_last`): to part them into planes would cost a seventh of a photograph's decoding.
    """
    return memory.reshape(-1, side, side, 3).transpose(0, 3, 1, 2)


def make_tiles(
    data: bytes,
    grid: tuple[int, int],
    layout: VisualLayout,
    *,
    out: np.ndarray | None = None,
    dct_scaling: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Decode an image and cut it.

    Args:
        out: uint8[1 + columns * rows, 3, S, S] to write the tiles to, such as a
            part of shared memory; None makes a new array.
        dct_scaling: let libjpeg shrink a JPEG that is more than twice too large.

    Returns:
        tiles: `out`. The base tile, then the crops row by row of the image
            scaled into the template, centred on black.
        patch_mask: bool[1 + columns * rows, P], False where a crop's patch is padding.

    Raises:
        SampleError: truncated, broken, too large, or of an unsupported mode.
    """
    side = layout.tile_size
    if out is None:
        out = empty_tiles(layout.tiles(grid), side)
    if dct_scaling:
        size = image_size(data)
        fitted = _fitted_size(size, grid, side)
        pixels = decode(data, at_least=(max(fitted[0], side), max(fitted[1], side)))
    else:
        pixels = decode(data)
        size = (pixels.shape[1], pixels.shape[0])
        fitted = _fitted_size(size, grid, side)
    _resize(pixels, out[0])
    if grid != NO_GRID:
        scaled = np.empty((fitted[1], fitted[0], 3), np.uint8).transpose(2, 0, 1)
        _resize(pixels, scaled)
        _cut(scaled, grid, out[1:])
    return out, patch_mask(size, grid, layout)


def decode(data: bytes, at_least: tuple[int, int] | None = None) -> np.ndarray:
    """Upright pixels, uint8[height, width, 3].

    Args:
        at_least: (width, height) that are enough: a JPEG may come 2, 4 or 8 times
            smaller, but no smaller than this.  Scaled by the decoder's DCT, its
            pixels are those of an exact resize to a level or two.

    Raises:
        SampleError: truncated, broken, too large, or of an unsupported mode.
    """
    if data.startswith(JPEG_START):
        width, height, orientation = _jpeg_header(data)
        if at_least and orientation >= 5:
            at_least = at_least[::-1]
        pixels = _decode_jpeg(data, width, height, at_least)
        if pixels is None:
            pixels, _ = _decode_pillow(data)
            if pixels.shape != (height, width, 3):
                raise SampleError(f"the image is {pixels.shape[1]}x{pixels.shape[0]}, its header says {width}x{height}")
    else:
        pixels, orientation = _decode_pillow(data)
    return np.ascontiguousarray(_upright(pixels, orientation))


def patch_mask(size: tuple[int, int], grid: tuple[int, int], layout: VisualLayout) -> np.ndarray:
    """bool[1 + columns * rows, P]: True where a patch shows the image.

    The released code's rule: the padding's width is rounded down in patches, so
    a patch that the image's edge crosses counts as image.  A very thin image may
    keep no patch of its crops; the base tile always keeps all.
    """
    columns, rows, n = *grid, layout.patches_per_side
    base = np.ones((1, n * n), dtype=bool)
    if grid == NO_GRID:
        return base
    (width, height), (across, down) = size, (columns * n, rows * n)
    kept = np.zeros((down, across), dtype=bool)
    if width / height > across / down:
        padding = (down - int(height * (across / width))) // 2
        kept[padding : down - padding] = True
    else:
        padding = (across - int(width * (down / height))) // 2
        kept[:, padding : across - padding] = True
    crops = kept.reshape(rows, n, columns, n).transpose(0, 2, 1, 3).reshape(columns * rows, n * n)
    return np.concatenate([base, crops])


def _fitted_size(size: tuple[int, int], grid: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) of an image scaled into a template."""
    (image_width, image_height), width, height = size, grid[0] * side, grid[1] * side
    scale_x, scale_y = width / image_width, height / image_height
    if scale_x < scale_y:
        return width, min(math.ceil(image_height * scale_x), height)
    return min(math.ceil(image_width * scale_y), width), height


def _resize(pixels: np.ndarray, out: np.ndarray) -> None:
    """uint8[H, W, 3] to `out`, uint8[3, height, width], which in memory is [height, width, 3], too."""
    import torch  # here: the planner reads sizes only

    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # in these strides torch sees its fast layout
    # What torch.nn.functional.interpolate calls, which can't be told where to write: a copy is a fortieth of decoding.
    torch.ops.aten._upsample_bicubic2d_aa.out(image, out.shape[1:], False, out=torch.from_numpy(out)[None])


def _cut(image: np.ndarray, grid: tuple[int, int], out: np.ndarray) -> None:
    """Lay an image [3, h, w] on the middle of a black canvas, whose crops are `out`, [columns * rows, 3, S, S]."""
    (columns, rows), side, (height, width) = grid, out.shape[-1], image.shape[1:]
    left, top = (columns * side - width) // 2, (rows * side - height) // 2
    if (width, height) != (columns * side, rows * side):
        out[:] = 0
    for number, crop in enumerate(out):
        row, column = divmod(number, columns)
        x, y = column * side - left, row * side - top  # the crop's corner in the image; negative in the padding
        shown = image[:, max(y, 0) : max(y + side, 0), max(x, 0) : max(x + side, 0)]
        crop[:, max(-y, 0) : max(-y, 0) + shown.shape[1], max(-x, 0) : max(-x, 0) + shown.shape[2]] = shown


def _jpeg_header(data: bytes) -> tuple[int, int, int]:
    """(width, height, EXIF orientation) of a JPEG, from the segments before its first scan.

    Raises:
        SampleError: there is no frame, or too large a one.
    """
    at, orientation = 2, 1
    try:
        for _ in range(_MAX_JPEG_SEGMENTS):
            at = _JPEG_MARKER.search(data, at).end()
            marker = data[at - 1]
            if marker in _JPEG_WITHOUT_LENGTH:
                continue
            if marker in _JPEG_FRAMES:
                height, width = struct.unpack_from(">HH", data, at + 3)
                _check_size(width, height)
                return width, height, orientation
            if marker in (_JPEG_SCAN, _JPEG_END):
                break
            end = at + int.from_bytes(data[at : at + 2])
            if marker == _JPEG_EXIF and data[at + 2 : at + 8] == b"Exif\0\0":
                orientation = _exif_orientation(data[at + 8 : end])
            at = end
    except (struct.error, AttributeError):  # the data end, or no marker follows
        pass
    raise SampleError("the image can't be decoded: a JPEG without a frame")


def _exif_orientation(exif: bytes) -> int:
    """1 to 8 from an EXIF block; 1, upright, where there is none: a broken block doesn't spoil the pixels."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == _EXIF_ORIENTATION:
                return value if (kind, count) == (3, 1) and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _decode_jpeg(data: bytes, width: int, height: int, at_least: tuple[int, int] | None) -> np.ndarray | None:
    """uint8[height, width, 3] as stored, or smaller; None where libjpeg-turbo has an objection."""
    if simplejpeg is None:
        return None
    scaled = {}
    if at_least:
        # Other factors that libjpeg has, such as 7/8, are slower than none.
        fitting = [f for f in (2, 4, 8) if width >= f * at_least[0] and height >= f * at_least[1]]
        factor = max(fitting, default=1)
        width, height = -(-width // factor), -(-height // factor)
        scaled = {"min_width": width, "min_height": height}
    # A given buffer bounds the memory, whatever libjpeg finds in the file.
    pixels = np.empty((height, width, 3), np.uint8)
    try:
        found = simplejpeg.decode_jpeg(data, "RGB", buffer=pixels, **scaled)
    except ValueError as error:
        # Pillow would take these, and show grey or garbage where the pixels are lost.
        if _LOST_PIXELS.search(str(error)):
            raise SampleError(f"the image can't be decoded: {error}") from None
        return None
    return pixels if found.shape == pixels.shape else None


@contextmanager
def _opened(data: bytes):
    """Pillow's lazy image, with whatever Pillow raises turned into SampleError."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.width, image.height)
            yield image
    except SampleError:
        raise
    except Exception as error:  # on broken bytes its decoders raise nearly anything
        # Not the message as it is: Pillow prints the address of the buffer.
        what = "unknown format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise SampleError(f"the image can't be decoded: {what or type(error).__name__}") from None


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise SampleError(f"the image is {width}x{height}, the limit is {MAX_PIXELS} pixels")


def _pillow_orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 is upright."""
    if image.format == "TIFF" or "exif" not in image.info:
        return 1  # Pillow rotates TIFF itself
    # Not image.getexif(): for PNG it decodes the pixels in search of a later chunk.
    return _exif_orientation(image.info["exif"].removeprefix(b"Exif\0\0"))


def _decode_pillow(data: bytes) -> tuple[np.ndarray, int]:
    """uint8[height, width, 3] as stored, and the EXIF orientation."""
    with _opened(data) as image:
        orientation = _pillow_orientation(image)  # before load(), which may find more EXIF in a PNG
        image.load()
        if image.mode.startswith("I;16"):  # first: on the way to RGBA Pillow would clip it, nearly all to white
            levels = np.asarray(image)
            grey = (levels >> 8).astype(np.uint8)
            grey[levels == image.info.get("transparency", -1)] = 255  # a PNG's one level that is not seen
            image = Image.fromarray(grey)
        elif image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.new("RGB", layer.size, "white")
            image.paste(layer, mask=layer)
        elif image.mode in ("I", "F"):
            raise SampleError(f"the image has 32 bits a pixel (mode {image.mode}), whose range is unknown")
        return np.array(image.convert("RGB")), orientation


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation, as a view."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
