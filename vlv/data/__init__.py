"""Rows of images and captions from folders, tables, archives and the Hub."""

from vlv.data.rows import load_rows, open_image

__all__ = ["load_rows", "open_image"]
