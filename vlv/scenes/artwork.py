"""Drawings of named things by several artists: a folder with index.json and one sheet of tiles for each artist.

index.json   {"tile": 64, "columns": 12, "names": [{"icon": "red-apple", "text": "apple"}, ...],
              "artists": {"noto": "Noto Emoji, Apache-2.0, Google", ...}}
noto.png     RGBA; tile i is in row i // columns and column i % columns, and shows thing number i
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

BUNDLED = Path(__file__).parent / "drawings"


@dataclass(frozen=True)
class Artwork:
    """
    Args:
        names: what a caption calls each thing.
        artists: by name, with licence and author.
        tiles: each artist's drawings of all things, uint8 (things, tile, tile, 4).
    """

    names: tuple[str, ...]
    artists: Mapping[str, str]
    tiles: Mapping[str, np.ndarray]


@cache
def bundled_artwork() -> Artwork:
    """The drawings that ship with this package."""
    return load_artwork(BUNDLED)


def load_artwork(folder: str | Path) -> Artwork:
    """Read a folder of sheets; raises OSError or ValueError, in one sentence, if it is incomplete or wrong."""
    folder = Path(folder)
    file = folder / "index.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no artwork folder {folder}.")
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no index.json: name a folder of sheets with their index.")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        tile, columns, things, artists = index["tile"], index["columns"], index["names"], index["artists"]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a JSON object in UTF-8: {error}.") from None
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}; it must have tile, columns, names and artists.") from None
    for name, value in (("tile", tile), ("columns", columns)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{file}: {name} must be a whole number above 0, not {value!r}.")
    if not isinstance(artists, dict) or not artists:
        raise ValueError(f"{file}: artists must map the name of each sheet to its licence, for at least one sheet.")
    names = _names(file, things)
    return Artwork(names, artists, {artist: _tiles(folder, artist, tile, columns, len(names)) for artist in artists})


def _names(file: Path, things: object) -> tuple[str, ...]:
    if not isinstance(things, list) or not things:
        raise ValueError(f"{file}: names must be a list of at least one thing.")
    names = []
    for number, thing in enumerate(things):
        name = thing.get("text") if isinstance(thing, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{file}: the thing number {number} has no name; give it a text for captions.")
        # A caption joins its things with commas and "and", so these cannot be part of a name.
        if name != " ".join(name.split()) or "," in name or "and" in name.split():
            raise ValueError(f"{file}: '{name}' must be words with one space between, without commas or 'and'.")
        if name in names:
            raise ValueError(f"{file}: two things are called '{name}'; each needs its own name.")
        names.append(name)
    return tuple(names)


def _tiles(folder: Path, artist: str, tile: int, columns: int, count: int) -> np.ndarray:
    file = folder / f"{artist}.png"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}/index.json names the artist {artist}, but there is no sheet {file}.")
    try:
        with Image.open(file) as image:
            sheet = np.asarray(image.convert("RGBA"))
    except Image.DecompressionBombError:
        raise ValueError(
            f"The sheet {file} is larger than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels; make its tiles "
            "smaller, or draw fewer things."
        ) from None
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"The sheet {file} cannot be read as an image: {error}.") from None
    height, width = -(-count // columns) * tile, min(count, columns) * tile
    if sheet.shape[0] < height or sheet.shape[1] < width:
        raise ValueError(
            f"The sheet {file} is {sheet.shape[1]}x{sheet.shape[0]} pixels, too small for the {count} things of its"
            f" index, which need {width}x{height}."
        )
    corners = (divmod(number, columns) for number in range(count))
    return np.stack([sheet[tile * y : tile * (y + 1), tile * x : tile * (x + 1)] for y, x in corners])
