"""
A folder of deliberately damaged images: `python tests/damaged.py FOLDER [COUNT] [SEED]`.

A file's name says how it is damaged, and has its number, such as `cut/0012.jpg`:

- `whole`: not damaged.
- `suffix`: not damaged, but with the suffix of another format.
- `large`: not damaged; a small file that takes hundreds of megabytes when it is decoded.
- `cut`: its end is missing.
- `flipped`: some of its bits are flipped.
- `bomb`: its header claims sizes that cannot be decoded, or decoding takes nearly for ever.
- `other`: it is not an image: empty, text, noise, a script.
"""

import io
import random
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = {
    **{
        ".png": {},
        ".apng": {"format": "PNG", "save_all": True},
        ".jpg": {"quality": 90},
        ".jpeg": {"progressive": True},
    },
    **{".webp": {"lossless": True}, ".gif": {}, ".tif": {"compression": "tiff_lzw"}, ".tiff": {"compression": "jpeg"}},
    **{".bmp": {}, ".dib": {}, ".ppm": {}, ".tga": {"compression": "tga_rle"}, ".jp2": {}, ".avif": {}, ".ico": {}},
    **{".icns": {}, ".pcx": {}, ".sgi": {}, ".dds": {}, ".im": {}, ".qoi": {}, ".mpo": {"save_all": True}},
}
READABLE = ("whole", "suffix", "large")
SHARES = {"whole": 15, "suffix": 10, "large": 0.4, "cut": 25, "flipped": 37, "bomb": 3, "other": 9.6}  # of a hundred
LARGE = 12_000  # pixels of a side


def write_damaged(folder: Path, count: int = 1000, seed: int = 0) -> list[str]:
    """Writes the images and returns their names, relative to the folder. The same arguments give the same files."""
    draw = random.Random(seed)
    kinds = [kind for kind, share in SHARES.items() for _ in range(round(count * share / 100))]
    suffixes = [suffix for suffix in FORMATS if suffix in Image.registered_extensions() or suffix == ".jpeg"]
    names = []
    for number, kind in enumerate(kinds):
        suffix = suffixes[number % len(suffixes)]
        content = _picture(suffix, draw)
        if kind == "suffix":
            suffix = draw.choice([other for other in suffixes if other != suffix])
        elif kind == "large":
            suffix, content = ".png", _large(("RGB", "RGBA", "L", "I;16")[number % 4])
        elif kind == "cut":
            content = content[: draw.randrange(1, len(content))]
        elif kind == "flipped":
            content = _flip(content, draw)
        elif kind == "bomb":
            suffix, content = _BOMBS[number % len(_BOMBS)]()
        elif kind == "other":
            content = _OTHERS[number % len(_OTHERS)](draw)
        name = f"{kind}/{number:04}{suffix}"
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        names.append(name)
    return names


def _picture(suffix, draw):
    """A small picture with shapes in it, as the bytes of a file."""
    size = 8 * draw.randint(2, 12), 8 * draw.randint(2, 12)
    if suffix in (".icns", ".ico"):
        size = 32, 32
    noise = np.frombuffer(draw.randbytes(48), np.uint8).reshape(4, 4, 3)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    content = io.BytesIO()
    options = {"format": Image.registered_extensions()[suffix], **FORMATS[suffix]}
    image.save(content, **options)
    return content.getvalue()


def _flip(content, draw):
    content = bytearray(content)
    for _ in range(draw.choice([1, 2, 8, 64])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def _large(mode):
    content = io.BytesIO()
    Image.new(mode, (LARGE, LARGE)).save(content, "PNG", compress_level=1)
    return content.getvalue()


def _png_that_claims(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


def _bmp_that_claims(width, height):
    return (
        b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 1000, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        + bytes(900)
    )


def _gif_that_claims(width, height):
    size = struct.pack("<HH", width, height)
    return b"GIF89a" + size + b"\xf0\x00\x00" + bytes(6) + b"," + bytes(4) + size + b"\x00\x02\x02\x44\x01\x00;"


def _jpeg_of_many_scans(scans=5000, side=1024):
    """A progressive JPEG that repeats its last scan many times. Each scan is decoded over the whole picture."""
    content = io.BytesIO()
    Image.new("L", (side, side)).save(content, "JPEG", progressive=True)
    content = content.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * scans + b"\xff\xd9"


_BOMBS = (
    lambda: (".png", _png_that_claims(50_000, 50_000)),
    lambda: (".png", _png_that_claims(2**31 - 1, 2**31 - 1)),
    lambda: (".png", _png_that_claims(13_000, 13_000)),  # an allowed size, but nearly all of the data is missing
    lambda: (".bmp", _bmp_that_claims(60_000, 60_000)),
    lambda: (".bmp", _bmp_that_claims(12_000, 12_000)),
    lambda: (".gif", _gif_that_claims(65_535, 65_535)),
    lambda: (".gif", _gif_that_claims(12_000, 12_000)),
    lambda: (".jpg", _jpeg_of_many_scans()),
)
_OTHERS = (
    lambda draw: b"",
    lambda draw: b"\x00" * 5000,
    lambda draw: draw.randbytes(3000),
    lambda draw: b"<html><body>404 Not Found</body></html>",
    lambda draw: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n",
    lambda draw: "Notizen über Bilder\n".encode("utf-16"),
)

if __name__ == "__main__":
    written = write_damaged(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    print(dict(Counter(name.partition("/")[0] for name in written)))
