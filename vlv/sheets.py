"""Pictures for people: an image beside its reconstruction, and sheets of many such pairs."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

SUFFIXES = (".png", ".jpg", ".webp")
PAPER, FRAME = (255, 255, 255), (224, 226, 230)
INK, FAINT, RIGHT, WRONG = (28, 32, 38), (120, 126, 136), (32, 140, 84), (204, 60, 52)
GAP, MARGIN = 8, 40
LABEL_LINES = 5


class Pair(NamedTuple):
    image: Image.Image
    reconstruction: Image.Image | None  # `None` in all pairs of a sheet that shows images alone
    label: str
    right: bool | None = None  # marks the label with a tick or a cross


def check_name(sheet: str | None) -> None:
    """Raises ValueError if the file that --sheet names cannot be a picture."""
    if sheet is not None and Path(sheet).suffix not in SUFFIXES:
        raise ValueError(f"--sheet {sheet} must end in {', '.join(SUFFIXES)}.")


def side_by_side(image: Image.Image, reconstruction: Image.Image) -> Image.Image:
    """The image beside its reconstruction, with the reconstruction's resolution and the image's proportions."""
    height = reconstruction.height * max(1, 256 // reconstruction.height)
    width = round(height * min(max(image.width / image.height, 1 / 4), 4))
    sheet = Image.new("RGB", (2 * width + GAP, height), PAPER)
    sheet.paste(_resized(image, (width, height)), (0, 0))
    sheet.paste(_resized(reconstruction, (width, height)), (width + GAP, 0))
    return sheet


def contact_sheet(pairs: Sequence[Pair], title: str, subtitle: str, columns: int = 3, tile: int = 192) -> Image.Image:
    """A sheet of labelled pairs under a heading. Each image gets a square with a side of `tile` pixels."""
    heading, small, text = (ImageFont.load_default(size) for size in (32, 17, 15))
    columns = min(columns, len(pairs))
    pair_width, between = 2 * tile + GAP, 32
    if all(pair.reconstruction is None for pair in pairs):
        pair_width = tile
    labels = [_wrapped(pair.label, text, pair_width - (22 if pair.right is not None else 0)) for pair in pairs]
    line_height = 21
    row_heights = [
        tile + 12 + line_height * max(map(len, labels[start : start + columns])) + 26
        for start in range(0, len(pairs), columns)
    ]
    width = max(
        2 * MARGIN + columns * pair_width + (columns - 1) * between,
        2 * MARGIN + round(max(heading.getlength(title), small.getlength(subtitle))),
    )
    top = MARGIN + 92
    sheet = Image.new("RGB", (width, top + sum(row_heights) + MARGIN - 26), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), title, font=heading, fill=INK)
    draw.text((MARGIN, MARGIN + 40), subtitle, font=small, fill=FAINT)
    for index, (pair, lines) in enumerate(zip(pairs, labels, strict=True)):
        row, column = divmod(index, columns)
        x, y = MARGIN + column * (pair_width + between), top + sum(row_heights[:row])
        for offset, picture in ((0, pair.image), (tile + GAP, pair.reconstruction)):
            if picture is not None:
                _paste_fitted(sheet, picture, (x + offset, y), tile)
        y += tile + 12
        if pair.right is not None:
            _draw_mark(draw, (x, y + 3), pair.right)
            x += 22
        for line in lines:
            draw.text((x, y), line, font=text, fill=INK)
            y += line_height
    return sheet


def _paste_fitted(sheet: Image.Image, picture: Image.Image, corner: tuple[int, int], tile: int) -> None:
    """Paste the whole picture into the middle of its square, with its proportions."""
    scale = tile / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    x, y = (start + (tile - side) // 2 for start, side in zip(corner, size, strict=True))
    if size != (tile, tile):
        ImageDraw.Draw(sheet).rectangle((*corner, corner[0] + tile - 1, corner[1] + tile - 1), fill=(244, 245, 247))
    sheet.paste(_resized(picture, size), (x, y))
    ImageDraw.Draw(sheet).rectangle((*corner, corner[0] + tile - 1, corner[1] + tile - 1), outline=FRAME)


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize. If the size is a whole multiple of the picture's, the pixels stay sharp."""
    whole = all(new % old == 0 for new, old in zip(size, picture.size, strict=True))
    return picture.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _wrapped(label: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The label in lines of at most `width` pixels, broken at spaces if possible. The end of a long label is cut."""
    lines = []
    rest = " ".join(label.split())
    while rest and len(lines) < LABEL_LINES:
        fits = bisect_right(range(1, len(rest) + 1), width, key=lambda end: font.getlength(rest[:end]))
        space = rest.rfind(" ", 0, fits + 1)
        end = len(rest) if fits == len(rest) else space if space > 0 else max(1, fits)
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        lines[-1] = lines[-1][:-1].rstrip() + "…"
    return lines


def _draw_mark(draw: ImageDraw.ImageDraw, corner: tuple[int, int], right: bool) -> None:
    # Drawn as lines, because PIL's own font has neither a tick nor a cross.
    x, y = corner
    if right:
        draw.line([(x + 1, y + 7), (x + 5, y + 11), (x + 13, y + 2)], fill=RIGHT, width=3, joint="curve")
    else:
        draw.line([(x + 2, y + 2), (x + 11, y + 11)], fill=WRONG, width=3)
        draw.line([(x + 11, y + 2), (x + 2, y + 11)], fill=WRONG, width=3)
