"""Pillow, which only pictures need. Where it is missing, the import of this module says how to install it."""

try:
    from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("pictures need Pillow: pip install 'dcdit[train]'", name=error.name) from None

__all__ = ["Image", "ImageDraw", "ImageFont", "UnidentifiedImageError"]
