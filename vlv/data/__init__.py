"""Rows of images and captions from wherever they are: folders, tables, archives, the Hub."""

from vlv.data.rows import load_rows, open_image

__all__ = ["load_rows", "open_image"]
