"""Making pictures smaller before they are stored."""

from __future__ import annotations

import io

from PIL import Image


def shrink(picture: Image.Image, extension: str, size: int) -> tuple[str, bytes]:
    """A picture with ``size`` pixels on its shorter side: PNG stays lossless, any other format becomes a JPEG."""
    scale, buffer = size / min(picture.size), io.BytesIO()
    smaller = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    if extension == "png":
        smaller.save(buffer, "PNG")
        return "png", buffer.getvalue()
    smaller.save(buffer, "JPEG", quality=95)
    return "jpg", buffer.getvalue()
