"""Reading images, from any source that people have, as they expect to see them."""

import base64
import binascii
import errno
import functools
import http.client
import importlib
import io
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

# What is opened, whatever a file is called. PIL knows more, but EPS starts Ghostscript, and the rest (WMF, HDF5, MPEG,
# ...) are stubs that decode nothing. TGA comes last: it has no signature.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF", "JXL", "JPEG2000", "PPM", "ICO", "PSD", "QOI"),
    *("BLP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "ICNS", "IM", "MSP", "PCD", "PCX", "PIXAR"),
    *("SGI", "SPIDER", "SUN", "XBM", "XPM", "TGA"),
)
# Formats that PIL reads through a plugin, where it is installed.
PLUGINS = {
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), "pillow-heif"),
    **dict.fromkeys((".avif", ".avifs"), "pillow-avif-plugin"),
    ".jxl": "pillow-jxl-plugin",
}
USER_AGENT = "vlv (Vision-Language-Vision; +https://arxiv.org/abs/2507.07104)"
BASE64 = re.compile(r"[A-Za-z0-9+/\s]{40,}={0,2}\s*")
TURNS = {  # what makes a picture upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
COLOUR_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # of an ICC profile that fits the mode
BAND = 2**22  # pixels that are converted at once, so that a large picture is not held several times

for _name in ("pillow_heif", "pillow_avif", "pillow_jxl"):
    with suppress(ImportError):
        _plugin = importlib.import_module(_name)
        if _name == "pillow_heif":
            _plugin.register_heif_opener()


def load_image(source: Any) -> Image.Image:
    """
    Any image, as people expect to see it, in RGB: EXIF orientation applied, transparency over white, colours of an ICC
    profile converted to sRGB, 16-bit and float scaled to 8 bits, CMYK and palettes converted, the first frame of an
    animation.

    Args:
        source: a path, an http(s) or `data:` URL, a base64 string, the bytes of a file, a file object, a PIL image, an
            (H, W[, C]) array of uint8, or a row of `datasets` (`{"bytes": ..., "path": ...}`).

    Raises:
        OSError: there is no such file, it may not be read, or the URL cannot be fetched.
        ValueError: it is empty, not an image, cut short or too large; the sentence begins with its name.
    """
    name, source = _find(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large pictures and odd metadata are fine; only a bomb is refused
            opened = isinstance(source, Image.Image)
            with nullcontext(source) if opened else Image.open(source, formats=_formats()) as image:
                return _to_rgb(image, copy=opened)
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
    except Exception as error:  # PIL's decoders and their libraries raise nearly everything on damaged data
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the system's, not a decoder's
            raise OSError(f"{name}: it cannot be read ({error.strerror}).") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        problem = "cannot be decoded" if isinstance(error, NotImplementedError) else "is damaged or cut short"
        raise ValueError(f"{name}: the image {problem} ({reason}).") from error


# ---- finding the bytes -------------------------------------------------------------------------------------


def _find(source):
    """The name for messages, and what PIL opens or has opened."""
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
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
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
    """The image that the text is in base64, or `None`."""
    if not BASE64.fullmatch(text):
        return None
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
        with Image.open(io.BytesIO(content), formats=_formats()[:-1]):  # all but TGA, for which any bytes may pass
            return content
    except (binascii.Error, UnidentifiedImageError):
        return None
    except Exception:  # an image, if a damaged one: opening it again says what is wrong with it
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
    """A URL as browsers take it, with spaces and any letters, as servers take it."""
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
    """A file's name for messages: bytes that are not UTF-8 as `\\xe9`, and never a whole image in base64."""
    name = os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else str(name)
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return name if len(name) <= 500 else f"{name[:80]}…{name[-80:]}"


# ---- from any mode to RGB ----------------------------------------------------------------------------------


@functools.cache
def _formats():
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_rgb(image, copy):
    """The picture in RGB, upright. `copy`: it is the caller's, and stays as it is."""
    _load(image)
    profile = image.info.get("icc_profile") or b""
    # Older releases of PIL open a PNG of 16 bits in the mode of 32.
    is_16_bits = image.mode.startswith("I;16") or image.format == "PNG"
    turned = _upright(image)
    if turned.mode == "RGB" and not turned.has_transparency_data and _to_srgb(profile, "RGB") is None:
        rgb = turned.copy() if copy and turned is image else turned
    else:
        scale = _scale(turned, is_16_bits)
        rgb = Image.new("RGB", turned.size)
        height = max(1, BAND // turned.width)
        for start in range(0, turned.height, height):
            band = turned.crop((0, start, turned.width, min(start + height, turned.height)))
            rgb.paste(_opaque(band if scale is None else _to_grey(band, scale), profile), (0, start))
    rgb.info = {}  # the profile and the orientation are applied: nobody shall apply them again
    return rgb


def _load(image):
    try:
        image.load()
    except (struct.error, TypeError, ValueError):
        # PIL turns a TIFF upright while loading it, and writes its other metadata anew, which may be too odd for that.
        if image.format != "TIFF" or image.tile or image.im.size != image.size:
            raise


def _upright(image):
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever odd metadata make PIL do: such a picture lies as it lies
        return image
    turn = TURNS.get(orientation[0] if isinstance(orientation, tuple) and orientation else orientation)
    return image if turn is None else image.transpose(turn)


def _scale(image, is_16_bits):
    """What brings the values of 16 bits, 32 bits or floats to 0..255; `None` for modes of 8 bits."""
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
    """RGB, its colours converted to sRGB, transparency over white."""
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


@functools.lru_cache(maxsize=16)  # the pictures of one camera or program share a profile
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB; `None` where it changes nothing, is broken, or is of other colours."""
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
    # Most profiles are sRGB under one of its many names: such pictures keep their pixels.
    probe = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), axis=-1).reshape(1, -1, 3)
    probe = Image.fromarray(probe if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
    change = np.asarray(transform.apply(probe), int) - np.asarray(probe.convert("RGB"), int)
    return transform if np.abs(change).max() > 2 else None


__all__ = ["load_image"]
