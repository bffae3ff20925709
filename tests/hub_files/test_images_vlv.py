"""Reading pictures as people see them: colour profiles, odd metadata, rare formats, all kinds of sources, errors."""

import base64
import http.server
import io
import os
import struct
import threading
import urllib.parse

import numpy as np
import pytest
import tiny
from PIL import EpsImagePlugin, Image, ImageCms

import images_vlv
from images_vlv import FORMATS, load_image
from processing_vlv import VLVProcessor
from vlv.images import SUFFIXES


def pixels(image):
    return np.asarray(image).astype(int)


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def picture():
    return tiny.images(1, size=(24, 16))[0]


# ---- colours -----------------------------------------------------------------------------------------------

# Chromaticities of the primaries of Display P3 and of sRGB, and of their white.
P3 = [(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)]
SRGB = [(0.640, 0.330), (0.300, 0.600), (0.150, 0.060)]
D65, D50 = np.array([0.95047, 1, 1.08883]), np.array([0.9642, 1, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def to_xyz(primaries):
    """The matrix from linear RGB to XYZ, adapted to D50, the white of ICC profiles."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    matrix = columns * np.linalg.solve(columns, D65)
    adapted = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ D65)) @ BRADFORD
    return adapted @ matrix


def profile(space, gamma, primaries=()):
    """A small ICC profile of version 2, with primaries and a gamma."""

    def fixed(*values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(*D50), b"desc": b"desc" + bytes(4) + struct.pack(">I", 1) + bytes(79)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    for channel, column in zip((b"r", b"g", b"b"), to_xyz(primaries).T if primaries else (), strict=False):
        tags |= {channel + b"XYZ": b"XYZ " + bytes(4) + fixed(*column), channel + b"TRC": curve}
    offset, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", offset + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", offset + len(data), bytes(4), 0x02100000, b"mntr", space, b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + fixed(*D50) + bytes(48)
    return header + table + data


P3_PROFILE = profile(b"RGB ", 2.2, P3)


def in_srgb(values, primaries=P3, gamma=2.2):
    """The colours of such a profile in sRGB."""
    linear = (np.asarray(values) / 255) ** gamma @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries)).T
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colours_of_a_profile_are_those_that_people_see(format):
    colours = np.array([[210, 63, 55], [40, 200, 40], [128, 128, 128], [250, 250, 250], [0, 0, 0]], np.uint8)
    image = Image.fromarray(colours[None].repeat(16, 0).repeat(16, 1))
    options = {"PNG": {}, "TIFF": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}[format]
    data = saved(image, format, icc_profile=P3_PROFILE, **options)
    loaded = load_image(data)
    assert np.abs(pixels(loaded)[8, 8::16] - in_srgb(colours)).max() <= (6 if format == "JPEG" else 2)
    assert "icc_profile" not in loaded.info
    assert np.array_equal(pixels(load_image(loaded)), pixels(loaded))  # a loaded image is not converted again
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(pixels(load_image(opened)), pixels(loaded))
        assert opened.info["icc_profile"] == P3_PROFILE


def test_a_profile_of_palettes_transparency_and_grey(picture):
    flat = Image.new("RGB", (8, 8), (210, 63, 55))
    expected = in_srgb([210, 63, 55])
    palette = load_image(saved(flat.quantize(4), "PNG", icc_profile=P3_PROFILE))
    assert np.abs(pixels(palette)[0, 0] - expected).max() <= 2
    flat.putalpha(128)
    clear = load_image(saved(flat, "PNG", icc_profile=P3_PROFILE))
    assert np.abs(pixels(clear)[0, 0] - (expected * 128 + 255 * 127) / 255).max() <= 2
    grey = Image.new("L", (8, 8), 100)
    lighter = load_image(saved(grey, "PNG", icc_profile=profile(b"GRAY", 1.4)))
    linear = (100 / 255) ** 1.4
    assert np.abs(pixels(lighter)[0, 0] - 255 * (1.055 * linear ** (1 / 2.4) - 0.055)).max() <= 2


@pytest.mark.parametrize(
    "useless",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"no profile",
        P3_PROFILE[:200],
        profile(b"GRAY", 1.4),
        profile(b"RGB ", 2.2, P3).replace(b"RGB ", b"CMYK"),
    ],
    ids=["sRGB", "nonsense", "cut", "of grey", "of another space"],
)
def test_a_useless_profile_changes_no_pixel(picture, useless):
    assert np.array_equal(pixels(load_image(saved(picture, "PNG", icc_profile=useless))), pixels(picture))


def test_a_large_picture_is_converted_in_bands_without_a_seam(monkeypatch):
    monkeypatch.setattr(images_vlv, "BAND", 100)
    values = np.arange(40 * 30, dtype=np.uint16).reshape(30, 40) * 50
    assert np.array_equal(pixels(load_image(saved(Image.fromarray(values), "PNG")))[..., 0], np.rint(values / 257))
    image = tiny.images(1, size=(40, 30))[0]
    image.putalpha(Image.fromarray((values // 257).astype(np.uint8)))
    over_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.array_equal(pixels(load_image(image)), pixels(over_white))


# ---- odd metadata ------------------------------------------------------------------------------------------

ORIENTATION = (0x112, 3, 1, struct.pack("<HH", 6, 0))  # the camera was turned
ODD = {  # tag, type, count, value: each makes PIL's own `exif_transpose` fail
    "a resolution in bytes": (0x11A, 1, 4, b"abcd"),
    "a unit in letters": (0x128, 2, 4, b"abc\0"),
    "a negative resolution": (0x11A, 9, 1, struct.pack("<i", -3)),
    "a width with a fraction": (0x100, 11, 1, struct.pack("<f", 3.5)),
}


def directory(entries, start=8):
    rows = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in sorted(entries))
    return b"II*\0" + struct.pack("<I", start), struct.pack("<H", len(entries)) + rows + struct.pack("<I", 0)


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_odd_metadata_beside_a_good_orientation(format, odd, picture):
    data = saved(picture, format, exif=b"Exif\0\0" + b"".join(directory([ORIENTATION, odd])))
    assert load_image(data).size == (16, 24)


@pytest.mark.parametrize("odd", [odd for odd in ODD.values() if odd[0] != 0x100])
def test_odd_metadata_of_a_tiff(odd):
    """PIL turns a TIFF upright while it loads it, and fails after that."""
    grey = np.arange(24 * 16, dtype=np.uint8).reshape(16, 24)
    sizes = [(256, 24), (257, 16), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 16), (279, grey.size)]
    entries = [(tag, 4, 1, struct.pack("<I", value)) for tag, value in sizes]
    head, rows = directory([*entries, ORIENTATION, odd], start=8 + grey.size)
    assert np.array_equal(pixels(load_image(head + grey.tobytes() + rows))[..., 0], np.rot90(grey, -1))


# ---- formats -----------------------------------------------------------------------------------------------


def test_suffixes_are_those_of_the_formats_that_are_opened():
    Image.init()
    registered = {suffix for suffix, format in Image.registered_extensions().items() if format in (*FORMATS, "MPO")}
    assert set(SUFFIXES) >= registered
    assert set(SUFFIXES) - registered <= set(images_vlv.PLUGINS)


@pytest.mark.parametrize(
    "format", ["ICO", "JPEG2000", "PSD", "QOI", "PCX", "SGI", "TGA", "DDS", "AVIF", "PPM", "ICNS"]
)
def test_formats_of_all_kinds(format, picture):
    if format == "PSD":  # PIL cannot write it: a header, no layers, three planes
        header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 16, 24, 8, 3) + bytes(12) + bytes(2)
        data = header + np.asarray(picture).transpose(2, 0, 1).tobytes()
    else:
        data = saved(picture.resize((32, 32)) if format in ("ICO", "ICNS") else picture, format)
    loaded = load_image(data)
    assert loaded.mode == "RGB" and min(loaded.size) >= 16


@pytest.mark.parametrize(("suffix", "plugin"), [("heic", "pillow_heif"), ("jxl", "pillow_jxl")])
def test_formats_of_plugins(suffix, plugin, picture, tmp_path):
    pytest.importorskip(plugin)
    picture.resize((64, 64)).save(tmp_path / f"phone.{suffix}", quality=95)
    assert np.abs(pixels(load_image(tmp_path / f"phone.{suffix}")) - pixels(picture.resize((64, 64)))).mean() < 8


def test_a_missing_plugin_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(images_vlv, "_formats", lambda: ("PNG", "TGA"))
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match=r"phone\.HEIC: .*PIL can read\. .*: pip install pillow-heif"):
        load_image(tmp_path / "phone.HEIC")


@pytest.mark.parametrize("suffix", ["eps", "jpg", "png", "tif", "ps"])
def test_no_file_starts_ghostscript(suffix, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    (tmp_path / f"drawing.{suffix}").write_bytes(saved(picture, "EPS"))
    with pytest.raises(ValueError, match=rf"drawing\.{suffix}: this is not an image that PIL can read"):
        load_image(tmp_path / f"drawing.{suffix}")


def damaged_avif(picture):
    data = saved(picture.resize((256, 256)), "AVIF")
    middle = data.index(b"mdat") + 30
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 60]) + data[middle + 60 :]


def unknown_dds(picture):
    data = bytearray(saved(picture, "DDS"))
    data[80:88] = struct.pack("<I4s", 4, b"WHAT")
    return bytes(data)


@pytest.mark.parametrize("make", [damaged_avif, unknown_dds])
def test_any_error_of_a_decoder_is_a_sentence(make, picture, tmp_path):
    file = tmp_path / "broken.png"
    file.write_bytes(make(picture))
    for source in (file, {"bytes": file.read_bytes(), "path": "broken.png"}):
        with pytest.raises(ValueError, match=r"broken\.png: the image (is damaged|cannot be decoded)"):
            load_image(source)


@pytest.mark.parametrize("error", [RuntimeError("so"), KeyError(7), struct.error("short"), AssertionError()])
def test_unexpected_errors_are_a_sentence(error, picture, monkeypatch):
    def fail(image):
        raise error

    monkeypatch.setattr(images_vlv, "_load", fail)
    for source in (saved(picture, "PNG"), picture):
        with pytest.raises(ValueError, match=r"^image: the image is damaged or cut short \(.+\)\.$"):
            load_image(source)


def test_a_picture_that_memory_cannot_hold(picture, monkeypatch):
    def fail(image):
        raise MemoryError

    monkeypatch.setattr(images_vlv, "_load", fail)
    with pytest.raises(ValueError, match="does not fit into memory"):
        load_image(picture)


# ---- names and addresses -----------------------------------------------------------------------------------


def test_names_that_no_file_can_have(tmp_path):
    for name in ("y" * 300 + ".png", "a\0b.png"):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            load_image(str(tmp_path / name))
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match=r"link\.png: this is a link to a file that is not there"):
        load_image(tmp_path / "link.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png: this is a pipe or a device"):
        load_image(tmp_path / "pipe.png")


def test_a_name_that_is_not_utf8_is_read_and_can_be_printed(tmp_path, picture):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        with open(path, "wb") as file:
            file.write(saved(picture, "PNG"))
    except OSError:
        pytest.skip("this file system knows UTF-8 only")
    assert np.array_equal(pixels(load_image(os.fsdecode(path))), pixels(picture))
    os.truncate(path, 60)
    with pytest.raises(ValueError, match=r"caf\\xe9\.png: ") as caught:
        load_image(os.fsdecode(path))
    str(caught.value).encode()


@pytest.fixture
def server(picture):
    """A web server with one picture at every address except /missing, and the requests that it received."""
    data, requests = saved(picture, "PNG"), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, self.headers["User-Agent"]))
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/to%20here.png")
            else:
                self.send_response(404 if "missing" in self.path else 200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", requests
        running.shutdown()


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("two words.png", "/two%20words.png"),
        ("café.png", "/caf%C3%A9.png"),
        ("caf%C3%A9.png", "/caf%C3%A9.png"),
        ("100% wool.png?size=ü&x=[1]", "/100%25%20wool.png?size=%C3%BC&x=[1]"),
    ],
)
def test_urls_as_browsers_take_them(server, picture, path, asked):
    address, requests = server
    assert np.array_equal(pixels(load_image(f"{address}/{path}")), pixels(picture))
    assert requests == [(asked, images_vlv.USER_AGENT)]
    assert "python" not in images_vlv.USER_AGENT.lower()


def test_urls_that_move_or_fail(server, picture):
    address, _ = server
    assert np.array_equal(pixels(load_image(f"{address}/moved")), pixels(picture))
    for url in (f"{address}/missing ü.png", "http://[nowhere/a.png", "http:///a.png", "http://127.0.0.1:x/a.png"):
        with pytest.raises(OSError) as caught:
            load_image(url)
        assert str(caught.value).startswith(f"{url}: it cannot be fetched (")


def test_data_urls_and_base64(picture):
    data = saved(picture, "PNG")
    text = base64.b64encode(data).decode()
    lines = base64.encodebytes(data).decode()
    for source in (
        *(text, lines, f"data:image/png;base64,{text}", f"data:;base64,{text}"),
        *(f"data:image/png;base64,{lines}", "data:image/png," + urllib.parse.quote(data)),
    ):
        assert np.array_equal(pixels(load_image(source)), pixels(picture))


def test_an_error_never_prints_the_whole_base64(picture):
    text = base64.b64encode(saved(tiny.images(1, size=(200, 200))[0], "PNG")).decode()
    broken = [text[: len(text) // 2 // 4 * 4], text[:-7] + "!!", "A" * 100_000]
    for source in (*broken, *(f"data:image/png;base64,{part}" for part in broken), f"data:image/png,{text}", "data:x"):
        with pytest.raises((OSError, ValueError)) as caught:
            load_image(source)
        assert len(str(caught.value)) < 300


# ---- the centre of strips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8000, 1), (1, 8000), (3000, 2), (90_000, 40), (1000, 10), (10, 1000)])
def test_the_centre_crop_of_a_strip_takes_little_memory(size, monkeypatch):
    image = Image.fromarray((np.arange(3 * size[0] * size[1]) * 7 % 251).astype(np.uint8).reshape(size[1], size[0], 3))
    processor = VLVProcessor(tiny.caption_tokenizer(), image_height=32, image_width=32, decoder_image_size=32)
    largest = 0

    def resize(image, size, *arguments, _resize=Image.Image.resize, **options):
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return _resize(image, size, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "resize", resize)
        seen = processor.preprocess_image(image, crop="center")
    assert seen.size == (32, 32) and largest <= 16 * 32 * 32
    scale = 32 / min(size)
    whole = image.resize([max(32, int(side * scale)) for side in size], Image.Resampling.BILINEAR)
    left, top = round((whole.width - 32) / 2), round((whole.height - 32) / 2)
    expected = whole.crop((left, top, left + 32, top + 32))
    assert np.abs(pixels(seen) - pixels(expected)).max() <= 1
