"""Files that are not plain pictures, and wrong settings."""

import struct
import zlib

import gradio_client
import numpy as np
import pytest
import tiny
from PIL import Image
from running_app import NEW_TOKENS, caption_of, pixels, upload


def bomb(file):
    """A PNG of 30,000 x 30,000 black pixels in a file of 110 kB."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    side = 30_000
    row = bytes(1 + side // 8)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = zlib.compress(row * side, 9)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def cut_short(file):
    tiny.images(1)[0].save(file)
    file.write_bytes(file.read_bytes()[:-60])


UNREADABLE = {
    "empty.png": lambda file: file.write_bytes(b""),
    "text.png": lambda file: file.write_text("This is no picture."),
    "bomb.png": bomb,
    "cut.png": cut_short,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_gets_one_sentence(app, client, captioner, pictures, tmp_path, name):
    file = tmp_path / name
    UNREADABLE[name](file)
    for arguments, endpoint, field in (
        ([upload(file)], "/caption", "image"),
        ([upload(file)], "/reconstruct", "image"),
        ([upload(pictures[0]), upload(file)], "/compose", "second"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError) as error:
            client.predict(*arguments, api_name=endpoint)
        assert str(error.value).startswith(f"{field}, {name}: ")
        assert "\n" not in str(error.value)
        assert str(app.log.parent) not in str(error.value)
    assert "Traceback" not in app.log.read_text()
    caption = client.predict(upload(pictures[0]), NEW_TOKENS, api_name="/caption")
    assert caption == caption_of(captioner, str(pictures[0]))


def test_a_file_over_the_limit_is_refused(client, captioner, pictures, tmp_path):
    file = tmp_path / "large.bmp"
    Image.new("RGB", (3000, 3000)).save(file)
    with pytest.raises(gradio_client.exceptions.AppError) as error:
        client.predict(upload(file), api_name="/caption")
    assert str(error.value) == (
        "image, large.bmp: the file has 27 MB, and 20 MB is the maximum file size: make it smaller first."
    )
    caption = client.predict(upload(pictures[0]), NEW_TOKENS, api_name="/caption")
    assert caption == caption_of(captioner, str(pictures[0]))


def sixteen_bit(picture, file):
    """A gradient over the whole range of 16 bits, of which clipping would leave a white picture."""
    Image.fromarray(np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)).save(file)
    return Image.fromarray(np.linspace(0, 255, 40 * 30).reshape(30, 40).round().astype(np.uint8)).convert("RGB")


def cmyk(picture, file):
    picture.convert("CMYK").save(file, quality=95)
    return Image.open(file).convert("RGB")


def animation(picture, file):
    frames = [frame.quantize() for frame in (picture, Image.new("RGB", picture.size, "red"))]
    frames[0].save(file, save_all=True, append_images=frames[1:])
    return picture


def transparent(picture, file):
    alpha = Image.new("L", picture.size, 0)
    alpha.paste(255, (0, 0, 20, 30))
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, (0, 0), alpha)
    picture = picture.copy()
    picture.putalpha(alpha)
    picture.save(file)
    return white


def rotated(picture, file):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    picture.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    return picture


def heic(picture, file):
    plugin = pytest.importorskip("pillow_heif")
    plugin.from_pillow(picture).save(file, quality=100)
    plugin.register_heif_opener()
    return Image.open(file).convert("RGB")


def single_pixel(picture, file):
    picture = Image.new("RGB", (1, 1), (200, 30, 90))
    picture.save(file)
    return picture


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, write",
    [
        ("sixteen-bit.tiff", sixteen_bit),
        ("cmyk.jpg", cmyk),
        ("animation.gif", animation),
        ("transparent.png", transparent),
        ("rotated.png", rotated),
        ("phone.heic", heic),
        ("single-pixel.png", single_pixel),
    ],
)
def test_an_unusual_file_is_read_as_a_person_sees_it(client, captioner, tmp_path, name, write):
    expected = write(tiny.images(1, seed=3)[0], tmp_path / name)
    original, _, caption = client.predict(upload(tmp_path / name), 1, api_name="/reconstruct")
    shown = pixels(original)
    assert shown.shape == pixels(expected).shape
    assert np.abs(shown.astype(int) - pixels(expected)).max() <= 2
    assert caption == caption_of(captioner, Image.fromarray(shown), max_new_tokens=300)


@pytest.mark.parametrize(
    "arguments, endpoint, sentence",
    [
        ((None,), "/caption", "image: choose a picture first."),
        ((None, "picture"), "/compose", "first: choose a picture first."),
        (("picture", None), "/compose", "second: choose a picture first."),
        (([],), "/caption_many", "images: choose some pictures first."),
        (("picture", 3, 2, None), "/reconstruct", "Seed is empty: give a whole number from 0 to 2147483647."),
        (("picture", 3, 2, -1), "/reconstruct", "Seed is -1: give a whole number from 0 to 2147483647."),
        (("picture", 0), "/reconstruct", "Steps is 0: give a whole number from 1 to 50."),
        (("picture", 2.5), "/reconstruct", "Steps is 2.5: give a whole number from 1 to 50."),
        (("picture", "picture", 1.5), "/compose", "Share of the first image is 1.5: give a number from 0 to 1."),
        (("picture", 24, 99), "/caption", "Beams is 99: give a whole number from 1 to 8."),
        (("picture", 24, 1, "", 1, -1), "/caption", "Seed is -1: give a whole number from 0 to 2147483647."),
        (("picture", 24, 1, "", 0, 0, 0), "/caption", "Queries is 0: give a whole number from 1 to 10."),
        (("picture", 3, 2, 0, 99), "/reconstruct", "Queries is 99: give a whole number from 1 to 10."),
    ],
)
def test_a_wrong_setting_gets_one_sentence(app, client, pictures, arguments, endpoint, sentence):
    """It names the setting, and the log stays free of it."""
    arguments = [upload(pictures[0]) if argument == "picture" else argument for argument in arguments]
    before = app.log.read_text()
    with pytest.raises(gradio_client.exceptions.AppError) as error:
        client.predict(*arguments, api_name=endpoint)
    assert str(error.value) == sentence
    assert app.log.read_text() == before
