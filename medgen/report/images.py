"""Pictures inside the page: marked, and as data, so that the page is one file."""

from __future__ import annotations

import base64
import io

from PIL import Image, ImageDraw, ImageFont

_STRIP, _TEXT = 34, 22  # pixels of a picture 1000 wide
_COLORS = {"synthetic": ((232, 119, 34), (0, 0, 0)), "real": ((64, 84, 104), (255, 255, 255))}
_LARGE = 4_000_000  # bytes above which a photographic format is taken


def mark(image: Image.Image, kind: str) -> Image.Image:
    """Write on a picture what it shows, in the pixels, so that a copy of the picture says so too.

    Args:
        image: The picture.
        kind: ``"real"`` or ``"synthetic"``.

    Returns:
        A picture with a strip on top.
    """
    paint, ink = _COLORS[kind]
    scale = max(image.width / 1000, 0.5)
    height = round(_STRIP * scale)
    marked = Image.new("RGB", (image.width, image.height + height), paint)
    marked.paste(image.convert("RGB"), (0, height))
    draw = ImageDraw.Draw(marked)
    font = ImageFont.load_default(_TEXT * scale)
    draw.text((height / 3, height / 2), kind.upper(), fill=ink, font=font, anchor="lm")
    return marked


def data_uri(image: Image.Image) -> str:
    """A picture as text for the page: without loss, unless it is very large.

    Args:
        image: The picture.

    Returns:
        A ``data:`` address.
    """
    shown = image if image.mode in ("L", "RGB") else image.convert("RGB")
    content, kind = io.BytesIO(), "png"
    shown.save(content, format="PNG", optimize=True)
    if content.tell() > _LARGE:
        content, kind = io.BytesIO(), "jpeg"
        shown.save(content, format="JPEG", quality=95)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
