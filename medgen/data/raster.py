"""PNG and TIFF pictures, gray or RGB, exactly as they are stored: Pillow alone would drop or stretch bits."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import png
import tifffile
from PIL import Image

from medgen.types import BadInputError

_TIFF_PACKING = 2000
# A PNG begins with its signature (8 bytes) and the IHDR chunk (25), which must come first.
_PNG_HEADER = 33


def read_png(path: Path, content: bytes, *, label: bool) -> np.ndarray:
    """Decode a PNG file.

    Args:
        path: The file, for the message.
        content: Its bytes.
        label: Give the indices of a palette picture, not its colors.

    Returns:
        ``(H, W)`` or ``(H, W, C)`` uint8 or uint16, an opaque alpha channel dropped.

    Raises:
        BadInputError: If it is animated or transparent. Damaged files raise whatever their decoder raises.
    """
    # Every chunk and its checksum, which decoding alone would not look at. Pillow goes by content, not by name.
    Image.open(io.BytesIO(content), formats=["PNG"]).verify()
    picture = Image.open(io.BytesIO(content), formats=["PNG"])
    depth, color = content[24], content[25]  # IHDR
    frames = int(getattr(picture, "n_frames", 1))
    if frames > 1:
        raise BadInputError(f"{path}: expected one picture, got {frames} frames. Split the file.")
    if depth < 8 or (depth == 16 and color != 0):
        # Pillow would reduce 16-bit colors to 8 bits and stretch 1-, 2- and 4-bit values.
        width, height, rows, info = png.Reader(bytes=content).read()
        flat = np.vstack([np.asarray(row) for row in rows]).reshape(height, width, info["planes"])
    else:
        flat = np.asarray(picture)
    if color == 3:
        if label:
            return flat.reshape(picture.height, picture.width)
        flat = np.asarray(picture.convert("RGBA"))
    elif "transparency" in picture.info:
        raise BadInputError(f"{path}: expected an opaque picture, got a transparent color. Save it without.")
    flat = flat.reshape(picture.height, picture.width, -1)
    return _without_alpha(path, flat) if flat.shape[-1] in (2, 4) else flat


def read_tiff(path: Path, content: bytes, *, label: bool) -> np.ndarray:
    """Decode a TIFF file of one page.

    Args:
        path: The file, for the message.
        content: Its bytes.
        label: Give the indices of a palette picture; without it, palettes are refused.

    Returns:
        ``(H, W, C)`` in the type of the file, an opaque alpha channel dropped.

    Raises:
        BadInputError: If it has several pages, transparency or another color model. Damaged files raise whatever their
            decoder raises.
    """
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages.first
        # A damaged size must not fill the memory: no lossless codec packs this tightly.
        if page.nbytes > _TIFF_PACKING * len(content):
            raise BadInputError(
                f"{path}: expected a picture that fits {len(content)} bytes, got one of {page.nbytes}. Copy it again."
            )
        photometric = tifffile.PHOTOMETRIC(page.photometric)
        stacked = sum(series.size for series in file.series) // max(page.size, 1)
        if max(stacked, len(file.pages)) != 1:
            raise BadInputError(f"{path}: expected one page, got {max(stacked, len(file.pages))}. Save a NIfTI volume.")
        allowed = {tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB}
        if photometric not in allowed | ({tifffile.PHOTOMETRIC.PALETTE} if label else set()):
            raise BadInputError(
                f"{path}: expected a gray (black is 0) or RGB picture, got {photometric.name}. Save it as one of these."
            )
        try:
            flat = page.asarray()
            if flat.ndim == 3 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
                flat = np.moveaxis(flat, 0, -1)
        except ValueError as error:
            # Codecs such as LZW: Pillow has them built in, but only for pictures that it holds exactly.
            picture = Image.open(io.BytesIO(content))
            if "imagecodecs" not in str(error) or picture.mode not in ("L", "RGB", "RGBA", "P", "I;16", "F"):
                raise
            flat = np.asarray(picture)
        flat = flat.reshape(page.imagelength, page.imagewidth, -1)
        # Samples of unstated meaning (0) are channels, as microscopes write them.
        return _without_alpha(path, flat) if any(int(extra) for extra in page.extrasamples) else flat


def encode_png(array: np.ndarray, *, description: str = "") -> bytes:
    """Encode a picture as PNG; the same arguments give the same bytes.

    Args:
        array: ``(C, H, W)`` uint8 or uint16, with 1 or 3 channels.
        description: ASCII text of the chunk ``tEXt`` under the keyword ``Description``; empty writes none.

    Returns:
        The file.
    """
    channels, height, width = array.shape
    buffer = io.BytesIO()
    if array.dtype == np.uint16 and channels == 3:
        rows = np.moveaxis(array, 0, -1).reshape(height, width * channels).astype(">u2")
        png.Writer(width, height, greyscale=False, bitdepth=16).write_packed(buffer, (row.tobytes() for row in rows))
    else:
        flat = array[0] if channels == 1 else np.moveaxis(array, 0, -1)
        Image.fromarray(np.ascontiguousarray(flat)).save(buffer, format="PNG")
    content = buffer.getvalue()
    if not description:
        return content
    chunk = io.BytesIO()
    png.write_chunk(chunk, b"tEXt", b"Description\0" + description.encode("ascii"))
    return content[:_PNG_HEADER] + chunk.getvalue() + content[_PNG_HEADER:]


def _without_alpha(path: Path, flat: np.ndarray) -> np.ndarray:
    if flat.dtype.kind != "u" or (flat[..., -1] != np.iinfo(flat.dtype).max).any():
        raise BadInputError(f"{path}: expected no transparency, got an alpha channel in use. Save it without alpha.")
    return flat[..., :-1]
