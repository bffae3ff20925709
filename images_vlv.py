"""Reads an image from any source into RGB, the way people expect to see it."""

import base64
import binascii
import errno
import functools
import http.client
import importlib
import io
import math
import os
import re
import stat
import struct
import urllib.parse
import urllib.request
import warnings
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

# The formats that are opened, regardless of a file's name. PIL knows more: EPS is left out because it starts
# Ghostscript, and the others (WMF, HDF5, MPEG, ...) because they decode nothing. TGA comes last: it has no signature.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF", "JXL", "JPEG2000", "PPM", "ICO", "PSD", "QOI"),
    *("BLP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "ICNS", "IM", "MSP", "PCD", "PCX", "PIXAR"),
    *("SGI", "SPIDER", "SUN", "XBM", "XPM", "TGA"),
)
# Formats that PIL reads only with a plugin installed.
PLUGINS = {
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), "pillow-heif"),
    **dict.fromkeys((".avif", ".avifs"), "pillow-avif-plugin"),
    ".jxl": "pillow-jxl-plugin",
}
STRIP = 16  # an image that is at least this many times longer than wide is a strip
USER_AGENT = "vlv (Vision-Language-Vision; +https://arxiv.org/abs/2507.07104)"
BASE64 = re.compile(r"[A-Za-z0-9+/\s]{40,}={0,2}\s*")
TURNS = {  # EXIF orientation: the operation that turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
COLOUR_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # PIL mode: the colour space of a fitting ICC profile
BAND = 2**22  # pixels that are converted at once, so that memory does not hold several copies of a large image

for _name in ("pillow_heif", "pillow_avif", "pillow_jxl"):
    with suppress(ImportError):
        _plugin = importlib.import_module(_name)
        if _name == "pillow_heif":
            _plugin.register_heif_opener()


def load_image(source: Any, copy: bool = True) -> Image.Image:
    """
    Any image in RGB, as people expect to see it. EXIF orientation is applied, transparency is drawn over white, and
    the colours of an ICC profile are converted to sRGB. 16-bit and float values are scaled to 8 bits, CMYK and
    palettes are converted. An animation gives its first frame.

    Args:
        source: a path, an http(s) or `data:` URL, a base64 string, the bytes of a file, a file object, a PIL image, an
            (H, W[, C]) array of uint8, or a row of `datasets` (`{"bytes": ..., "path": ...}`).
        copy: a PIL image that needs no conversion is copied. Without it the image itself is returned: it must not be
            changed then.

    Raises:
        OSError: there is no such file, it may not be read, or the URL cannot be fetched.
        ValueError: it is empty, not an image, cut short or too large; the sentence begins with its name.
    """
    name, source = _find(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large images and odd metadata are fine; a decompression bomb is an error
            opened = isinstance(source, Image.Image)
            with nullcontext(source) if opened else Image.open(source, formats=_formats()) as image:
                return _to_rgb(image, is_own=not opened, copy=copy)
    except UnidentifiedImageError as error:
        plugin = PLUGINS.get(os.path.splitext(name)[1].lower())
        needs = f" Such files need a plugin: pip install {plugin}" if plugin else ""
        raise ValueError(f"{name}: this is not an image that PIL can read.{needs}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name}: the image is larger than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels; make it smaller "
            "first (or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it)."
        ) from error
    except MemoryError as error:
        raise ValueError(f"{name}: the image does not fit into memory; make it smaller first.") from error
    except Exception as error:  # on damaged data, PIL's decoders and their libraries raise errors of almost any class
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # from the system, not a decoder
            raise OSError(f"{name}: it cannot be read ({error.strerror}).") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        problem = "cannot be decoded" if isinstance(error, NotImplementedError) else "is damaged or cut short"
        raise ValueError(f"{name}: the image {problem} ({reason}).") from error


# ---- finding the bytes -------------------------------------------------------------------------------------


def _find(source):
    """The name for messages, and what PIL can open (or a PIL image)."""
    if isinstance(source, dict) and "bytes" in source:
        if source["bytes"] is None:
            return _find(source.get("path"))
        return _printable(source.get("path") or "image"), io.BytesIO(source["bytes"])
    if isinstance(source, Image.Image):
        return "image", source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or source.shape[2:] not in ((), (3,), (4,)):
            raise ValueError(
                f"The image array is {source.shape} {source.dtype}: expected (height, width[, 3 or 4]) of uint8."
            )
        if 0 in source.shape:
            raise ValueError("image array: the image has no pixels.")
        return "image array", Image.fromarray(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "image", io.BytesIO(source)
    if hasattr(source, "read"):
        return _printable(getattr(source, "name", "image")), source
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        return _fetch(source)
    if isinstance(source, (str, os.PathLike)):
        return _find_file(source)
    raise ValueError(f"An image cannot be read from a {type(source).__name__}: give a path, URL, bytes or PIL image.")


def _find_file(path):
    name = _printable(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: not a possible file name
        if isinstance(error, PermissionError):
            raise PermissionError(f"{name}: it may not be read ({error.strerror}).") from error
        content = _from_base64(path) if isinstance(path, str) else None
        if content is not None:
            return "base64 image", io.BytesIO(content)
        missing = "this is a link to a file that is not there" if _is_link(path) else "there is no such file"
        raise FileNotFoundError(f"{name}: {missing}.") from error
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{name}: this is a folder, not an image.")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{name}: this is a pipe or a device, not an image file.")
    if status.st_size == 0:
        raise ValueError(f"{name}: the file is empty.")
    return name, path


def _is_link(path):
    return os.path.islink(path) if "\0" not in os.fsdecode(path) else False


def _from_base64(text):
    """The bytes of the image that the text encodes, or `None`."""
    if not BASE64.fullmatch(text):
        return None
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
        with Image.open(io.BytesIO(content), formats=_formats()[:-1]):  # without TGA, which takes almost any bytes
            return content
    except (binascii.Error, UnidentifiedImageError):
        return None
    except Exception:  # a damaged image: the caller opens it again and reports what is wrong
        return content


def _fetch(url):
    name = f"{url[:40].partition(',')[0]},…" if url.startswith("data:") else _printable(url)
    try:
        request = urllib.request.Request(_quoted(url), headers={"User-Agent": USER_AGENT})
        with urllib.request.urlopen(request, timeout=30) as response:
            return name, io.BytesIO(response.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        if url.startswith("data:"):
            raise ValueError(f"{name}: the data in this URL cannot be decoded.") from error
        raise OSError(f"{name}: it cannot be fetched ({' '.join(str(error).split())}).") from error


def _quoted(url):
    """Escapes spaces and non-ASCII letters, as browsers do, so that servers accept the URL."""
    if url.startswith("data:"):
        return url
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (
        urllib.parse.quote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", part), safe="%/:=&?~#+!$,;'@()*[]")
        for part in (parts.path, parts.query)
    )
    return urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))


def _printable(name):
    """A file's name for messages. Bytes that are not UTF-8 become `\\xe9`. Long names, such as base64, are cut."""
    name = os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else str(name)
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return name if len(name) <= 500 else f"{name[:80]}…{name[-80:]}"


# ---- from any mode to RGB ----------------------------------------------------------------------------------


@functools.cache
def _formats():
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_rgb(image, is_own, copy):
    """The image in RGB and upright. `is_own`: no caller holds it. `copy`: an unchanged image is copied if one does."""
    _load(image)
    profile = image.info.get("icc_profile") or b""
    # Older releases of PIL open a 16-bit PNG in the 32-bit mode.
    is_16_bits = image.mode.startswith("I;16") or image.format == "PNG"
    turned = _upright(image)
    if turned.mode == "RGB" and not turned.has_transparency_data and _to_srgb(profile, "RGB") is None:
        if turned is image and not is_own and not copy:
            return image
        rgb = turned if is_own or turned is not image else turned.copy()
    else:
        scale = _scale(turned, is_16_bits)
        rgb = Image.new("RGB", turned.size)
        height = max(1, BAND // turned.width)
        for start in range(0, turned.height, height):
            band = turned.crop((0, start, turned.width, min(start + height, turned.height)))
            rgb.paste(_opaque(band if scale is None else _to_grey(band, scale), profile), (0, start))
    rgb.info = {}  # profile and orientation are applied and must not be applied again
    return rgb


def _load(image):
    try:
        image.load()
    except (struct.error, TypeError, ValueError):
        # PIL turns a TIFF upright while it loads it, and rewrites the other metadata. That fails where they are
        # damaged, but by then the pixels are complete.
        if image.format != "TIFF" or image.tile or image.im.size != image.size:
            raise


def _upright(image):
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata can raise any error in PIL: such an image is not turned
        return image
    turn = TURNS.get(orientation[0] if isinstance(orientation, tuple) and orientation else orientation)
    return image if turn is None else image.transpose(turn)


def _scale(image, is_16_bits):
    """The factor that scales 16-bit, 32-bit or float values to 0..255. `None` for 8-bit modes."""
    if image.mode.startswith("I;16"):
        return 1 / 257
    if image.mode not in ("I", "F"):
        return None
    _, top = image.getextrema()
    return 255 if image.mode == "F" and top <= 1 else 1 if top <= 255 and not is_16_bits else 1 / 257


def _to_grey(band, scale):
    values = np.nan_to_num(np.asarray(band, dtype=np.float32), posinf=np.inf, neginf=-np.inf)
    return Image.fromarray(np.clip(values * scale, 0, 255).round().astype(np.uint8))


def _opaque(band, profile):
    """Converts to RGB: colours to sRGB, transparency over white."""
    alpha = band.convert("RGBA").getchannel("A") if band.has_transparency_data else None
    if band.mode == "LA":
        band = band.getchannel("L")
    if band.mode not in COLOUR_SPACES:
        band = band.convert("RGB") if alpha is None else band.convert("RGBA").convert("RGB")
    transform = _to_srgb(profile, band.mode)
    rgb = band.convert("RGB") if transform is None else transform.apply(band)
    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")


@functools.lru_cache(maxsize=16)  # images from one camera or program share a profile
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Converts a profile's colours to sRGB. `None` where that changes nothing, or the profile does not fit."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if not profile or source.profile.xcolor_space.strip() != COLOUR_SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=ImageCms.Flags.BLACKPOINTCOMPENSATION
        )
    except (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError):
        return None
    if mode == "CMYK":
        return transform
    # Most profiles are sRGB under one of its many names. Such images keep their pixels.
    probe = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), axis=-1).reshape(1, -1, 3)
    probe = Image.fromarray(probe if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
    change = np.asarray(transform.apply(probe), int) - np.asarray(probe.convert("RGB"), int)
    return transform if np.abs(change).max() > 2 else None


def cut_centre(image, size):
    """The square in the middle, `size` pixels wide, of the image with its shorter side resized to that."""
    scale = size / min(image.size)
    resized = [max(size, int(side * scale)) for side in image.size]
    corner = [round((side - size) / 2) for side in resized]
    if max(resized) <= STRIP * size:
        image = image.resize(tuple(resized), Image.Resampling.BILINEAR)
        return image.crop((*corner, corner[0] + size, corner[1] + size))
    # A long strip would grow to gigabytes. Only the square and the pixels that the filter reads around it are resized.
    steps = [before / after for before, after in zip(image.size, resized, strict=True)]
    box = [place * step for place, step in zip((*corner, corner[0] + size, corner[1] + size), 2 * steps, strict=True)]
    left, top = (max(0, math.floor(place - step) - 1) for place, step in zip(box[:2], steps, strict=True))
    right, bottom = (math.ceil(place + step) + 1 for place, step in zip(box[2:], steps, strict=True))
    around = image.crop((left, top, min(right, image.width), min(bottom, image.height)))
    inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    return around.resize((size, size), Image.Resampling.BILINEAR, box=inner)


def list_images(images):
    """One image or several as a list. What is made for several images in a text gives each in a list of its own."""
    if not isinstance(images, (list, tuple)):
        return [images]
    for image in images:
        if isinstance(image, (list, tuple)) and len(image) != 1:
            raise ValueError(f"There are {len(image)} images for one text: a VLV reads exactly one.")
    return [image[0] if isinstance(image, (list, tuple)) else image for image in images]


__all__ = ["cut_centre", "list_images", "load_image"]
