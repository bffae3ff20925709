"""Reading images as people expect to see them, and turning images and captions into tensors."""

import functools
import http.server
import io
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image

from processing_vlv import VLVProcessor, load_image

# ---- reading images ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture():
    """A smooth 24x16 picture in RGB with four different corners."""
    x, y = np.meshgrid(np.linspace(0, 255, 24), np.linspace(0, 255, 16))
    return Image.fromarray(np.stack([x, y, 255 - x / 2 - y / 2], axis=-1).astype(np.uint8))


def pixels(image):
    return np.asarray(image).astype(int)


def assert_looks_like(image, expected, tolerance=0):
    assert image.mode == "RGB"
    assert image.size == expected.size
    assert np.abs(pixels(image) - pixels(expected)).max() <= tolerance


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tiff", "gif", "jpg"])
def test_common_formats(tmp_path, picture, suffix):
    path = tmp_path / f"picture.{suffix}"
    saved = picture.quantize(256, dither=Image.Dither.NONE) if suffix == "gif" else picture
    saved.save(path, **({"lossless": True} if suffix == "webp" else {"quality": 98} if suffix == "jpg" else {}))
    assert_looks_like(load_image(path), saved.convert("RGB"), tolerance=16 if suffix == "jpg" else 0)


def test_every_kind_of_source(tmp_path, picture):
    path = tmp_path / "picture.png"
    picture.save(path)
    data = path.read_bytes()
    with open(path, "rb") as file:
        sources = [
            path, str(path), data, bytearray(data), io.BytesIO(data), file, picture, np.asarray(picture),
            {"bytes": data, "path": None}, {"bytes": None, "path": str(path)},
        ]  # fmt: skip
        for source in sources:
            assert_looks_like(load_image(source), picture)


def test_arrays_of_grey_and_with_transparency(picture):
    grey = picture.convert("L")
    assert_looks_like(load_image(np.asarray(grey)), grey.convert("RGB"))
    clear = np.dstack([np.asarray(picture), np.zeros((16, 24), np.uint8)])
    assert (pixels(load_image(clear)) == 255).all()


@pytest.fixture
def server(tmp_path):
    """The address of a web server on the loopback interface that serves the test's folder."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_urls(tmp_path, server, picture):
    picture.save(tmp_path / "picture.png")
    assert_looks_like(load_image(f"{server}/picture.png"), picture)
    with pytest.raises(OSError, match=f"^{server}/missing.png: .*404"):
        load_image(f"{server}/missing.png")
    (tmp_path / "page.html").write_text("<html></html>")
    with pytest.raises(ValueError, match=f"^{server}/page.html: this is not an image"):
        load_image(f"{server}/page.html")
    with pytest.raises(OSError, match="^http://127.0.0.1:9/picture.png: "):
        load_image("http://127.0.0.1:9/picture.png")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_over_white(tmp_path, mode, picture):
    image = picture.convert("RGBA")
    alpha = np.zeros((16, 24), np.uint8)
    alpha[:, 8:16], alpha[:, 16:] = 128, 255
    image.putalpha(Image.fromarray(alpha))
    opaque = pixels(picture)
    if mode == "LA":
        image, opaque = image.convert("LA"), pixels(picture.convert("L").convert("RGB"))
    source = image
    if mode != "PA":
        source = tmp_path / "clear.png"
        image.save(source)
    else:  # no file format has this mode, so the image is only in memory
        source = picture.quantize(256, dither=Image.Dither.NONE)
        opaque = pixels(source.convert("RGB"))
        source = source.convert("PA")
        source.putalpha(Image.fromarray(alpha))
    weight = alpha[..., None] / 255
    expected = opaque * weight + 255 * (1 - weight)
    loaded = load_image(source)
    assert loaded.mode == "RGB"
    assert np.abs(pixels(loaded) - expected).max() <= 1.5


def test_a_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    for suffix in ("png", "gif"):
        image.save(tmp_path / f"palette.{suffix}", transparency=0)
        loaded = load_image(tmp_path / f"palette.{suffix}")
        assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 50)]
    image.save(tmp_path / "partly.png", transparency=bytes([255, 0]))
    loaded = load_image(tmp_path / "partly.png")
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


def test_black_and_white_and_grey(tmp_path, picture):
    for mode in ("1", "L"):
        picture.convert(mode).save(tmp_path / "grey.png")
        assert_looks_like(load_image(tmp_path / "grey.png"), picture.convert(mode).convert("RGB"))


def test_cmyk(tmp_path, picture):
    picture.convert("CMYK").save(tmp_path / "print.jpg", quality=98)
    assert_looks_like(load_image(tmp_path / "print.jpg"), picture, tolerance=16)


@pytest.mark.parametrize(("suffix", "dtype"), [("png", "<u2"), ("tiff", "<u2"), ("tiff", ">u2")])
def test_sixteen_bits_keep_their_brightness(tmp_path, suffix, dtype):
    Image.fromarray(np.array([[0, 257, 128 * 257, 65535]], dtype)).save(tmp_path / f"deep.{suffix}")
    assert pixels(load_image(tmp_path / f"deep.{suffix}"))[0, :, 0].tolist() == [0, 1, 128, 255]
    Image.fromarray(np.array([[0, 200]], dtype)).save(tmp_path / f"dark.{suffix}")  # nearly black, as before
    assert pixels(load_image(tmp_path / f"dark.{suffix}"))[0, :, 0].tolist() == [0, 1]


@pytest.mark.parametrize("values", [[0.0, 0.5, 1.0], [0.0, 127.5, 255.0], [0.0, 32767.5, 65535.0]], ids=str)
def test_floats_in_any_usual_range(tmp_path, values):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "float.tiff")
    loaded = pixels(load_image(tmp_path / "float.tiff"))[0, :, 0]
    assert loaded[0] == 0 and loaded[1] in (127, 128) and loaded[2] == 255


def test_an_animation_shows_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for name in ("moving.gif", "moving.png", "moving.webp"):
        frames[0].save(
            tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if "webp" in name else {})
        )
        assert load_image(tmp_path / name).getpixel((3, 3)) == (255, 0, 0)


# How the stored pixels must be turned for each value of the EXIF orientation (Exif 2.32, table 6).
ORIENTATIONS = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: stored.transpose(1, 0, 2)[:, ::-1],
    7: lambda stored: stored.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda stored: stored.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_is_applied(tmp_path, picture, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    picture.save(path, exif=exif, **({"quality": 98} if suffix == "jpg" else {}))
    expected = Image.fromarray(ORIENTATIONS[orientation](np.asarray(picture)).copy())
    assert_looks_like(load_image(path), expected, tolerance=16 if suffix == "jpg" else 0)
    with Image.open(path) as opened:  # also for an image that the caller opened
        assert_looks_like(load_image(opened), expected, tolerance=16 if suffix == "jpg" else 0)


def test_one_pixel(tmp_path, tiny_processor):
    Image.new("RGB", (1, 1), "teal").save(tmp_path / "dot.png")
    assert load_image(tmp_path / "dot.png").size == (1, 1)
    for crop in (None, "center"):
        inputs = tiny_processor(images=tmp_path / "dot.png", crop=crop, return_decoder_pixel_values=True)
        teal = torch.tensor([0.0, 128.0, 128.0])[:, None, None].expand(3, 32, 32) / 127.5 - 1
        torch.testing.assert_close(inputs["decoder_pixel_values"][0], teal)
        assert inputs["pixel_values"].isfinite().all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.9])
def test_a_cut_file_is_refused_by_name(tmp_path, suffix, part):
    path = tmp_path / f"cut.{suffix}"
    tiny.images(1, size=(200, 150))[0].save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=r"^\S*cut\.\w+: .*(damaged or cut short|not an image)"):
        load_image(path)


def test_a_file_that_is_not_an_image_is_refused_by_name(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"empty\.png: the file is empty"):
        load_image(tmp_path / "empty.png")
    (tmp_path / "notes.jpg").write_text("milk, eggs, bread")
    with pytest.raises(ValueError, match=r"notes\.jpg: this is not an image"):
        load_image(tmp_path / "notes.jpg")
    with pytest.raises(FileNotFoundError, match=r"missing\.png: there is no such file"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="this is a folder, not an image"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match="image: the .* is empty|image: this is not an image"):
        load_image(b"")
    with pytest.raises(ValueError, match="image: this is not an image"):
        load_image(b"no image")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("1", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)  # PIL refuses twice as many
    with pytest.raises(ValueError, match=r"bomb\.png: the image is larger than .* million pixels; make it smaller"):
        load_image(tmp_path / "bomb.png")


def test_a_large_picture_is_read_without_a_warning(tmp_path, monkeypatch, recwarn):
    Image.new("1", (300, 300)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    assert load_image(tmp_path / "large.png").size == (300, 300)
    assert not recwarn


@pytest.mark.parametrize(
    "source",
    [None, 3, torch.zeros(3, 4, 4), np.zeros((4, 4, 3)), np.zeros((4, 4, 7), np.uint8), np.zeros(4, np.uint8)],
    ids=lambda source: f"{type(source).__name__} {tuple(getattr(source, 'shape', ()))}",
)
def test_other_types_than_images_are_refused(source):
    with pytest.raises(ValueError, match="(?i)image.*(path|URL|uint8)"):
        load_image(source)


def test_the_source_is_not_changed(tmp_path, picture):
    image = picture.convert("RGBA")
    before = image.tobytes()
    load_image(image)
    assert image.mode == "RGBA" and image.tobytes() == before
    picture.save(tmp_path / "picture.png")
    with open(tmp_path / "picture.png", "rb") as file:
        load_image(file)
        assert not file.closed


def test_an_image_is_copied_unless_copy_is_false(picture):
    image = picture.convert("RGB")
    image.info["note"] = "kept"
    copy = load_image(image)
    copy.putpixel((0, 0), (1, 2, 3))
    assert copy is not image and image.getpixel((0, 0)) != (1, 2, 3)
    assert load_image(image, copy=False) is image and image.info == {"note": "kept"}


def test_the_processor_changes_no_image_of_the_caller(tiny_processor, picture):
    image = picture.convert("RGB")
    before = image.tobytes()
    for crop in (None, "center"):
        tiny_processor(images=image, crop=crop, return_decoder_pixel_values=True)
    assert image.tobytes() == before
    assert tiny_processor.preprocess_image(image) is not image


# ---- images to tensors -------------------------------------------------------------------------------------


def test_pixels_are_those_of_florences_own_image_processor(tiny_components):
    processor = VLVProcessor.from_components(tiny_components / "encoder", tiny_components / "decoder")
    image_processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    expected = image_processor.from_pretrained(tiny_components / "encoder", do_center_crop=False)
    images = tiny.images(2, size=(57, 41))
    actual = processor(images=images)["pixel_values"]
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected(images, return_tensors="pt").pixel_values, rtol=0, atol=1e-6)


def test_height_and_width_are_not_mixed_up():
    processor = VLVProcessor(tiny.caption_tokenizer(), image_height=16, image_width=48, decoder_image_size=8)
    inputs = processor(images=tiny.images(2), return_decoder_pixel_values=True)
    assert inputs["pixel_values"].shape == (2, 3, 16, 48)
    assert inputs["decoder_pixel_values"].shape == (2, 3, 8, 8)


def test_decoder_pixels_span_minus_one_to_one(tiny_processor):
    picture = Image.new("RGB", (32, 32), (0, 255, 51))
    decoder_pixel_values = tiny_processor(images=picture, return_decoder_pixel_values=True)["decoder_pixel_values"]
    torch.testing.assert_close(decoder_pixel_values[0, :, 5, 5], torch.tensor([-1.0, 1.0, -0.6]))
    assert "decoder_pixel_values" not in tiny_processor(images=picture)


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (50, 50), (33, 32), (7, 200)])
def test_the_centre_crop_is_the_papers(size):
    """The shorter side is resized to the decoder's size, and the centre is cut out, for encoder and decoder."""
    image = tiny.images(1, size=size)[0]
    processor = VLVProcessor(tiny.caption_tokenizer(), image_height=32, image_width=32, decoder_image_size=32)
    width, height = size
    short = min(size)
    resized = image.resize((width * 32 // short, height * 32 // short), Image.Resampling.BILINEAR)
    array = np.asarray(resized)
    top, left = round((array.shape[0] - 32) / 2), round((array.shape[1] - 32) / 2)
    cut = array[top : top + 32, left : left + 32]
    inputs = processor(images=image, crop="center", return_decoder_pixel_values=True)
    torch.testing.assert_close(
        inputs["decoder_pixel_values"][0].permute(1, 2, 0), torch.tensor(cut / 127.5 - 1).float()
    )
    same = processor(images=Image.fromarray(cut))["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values"], same)
    assert processor.preprocess_image(image, "center").size == (32, 32)
    assert processor.preprocess_image(image).size == size  # the whole of it by default


def test_a_processor_may_crop_by_default():
    image = tiny.images(1, size=(96, 32))[0]
    cropping = VLVProcessor(tiny.caption_tokenizer(), decoder_image_size=32, crop="center")
    whole = VLVProcessor(tiny.caption_tokenizer(), decoder_image_size=32)
    torch.testing.assert_close(
        cropping(images=image)["pixel_values"], whole(images=image, crop="center")["pixel_values"]
    )
    for wrong in (lambda: whole(images=image, crop="top"), lambda: VLVProcessor(tiny.caption_tokenizer(), crop="top")):
        with pytest.raises(ValueError, match="crop is 'top': choose None .* or 'center'"):
            wrong()


def test_one_image_or_several_of_any_kind(tmp_path, tiny_processor):
    images = tiny.images(2)
    images[1].save(tmp_path / "second.png")
    expected = tiny_processor(images=images)["pixel_values"]
    for mixed in (
        [images[0], tmp_path / "second.png"],
        (np.asarray(images[0]), (tmp_path / "second.png").read_bytes()),
    ):
        assert torch.equal(tiny_processor(images=mixed)["pixel_values"], expected)
    assert torch.equal(tiny_processor(images=images[0])["pixel_values"], expected[:1])


# ---- captions to tensors and back --------------------------------------------------------------------------

EOS = 0


def test_captions_to_train_on_end_with_the_end_of_text_and_are_padded_on_the_right(tiny_processor):
    tokenizer = tiny_processor.tokenizer
    inputs = tiny_processor(text=["a cat", "ox"], return_labels=True)
    cat, ox = tokenizer("a cat").input_ids, tokenizer("ox").input_ids
    assert inputs["input_ids"].tolist() == [[*cat, EOS], [*ox, EOS, EOS, EOS, EOS]]
    assert inputs["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert inputs["labels"].tolist() == [[*cat, EOS], [*ox, EOS, -100, -100, -100]]


def test_beginnings_to_continue_are_padded_on_the_left(tiny_processor):
    tokenizer = tiny_processor.tokenizer
    inputs = tiny_processor(text=["a cat", "ox", ""])
    cat, ox = tokenizer("a cat").input_ids, tokenizer("ox").input_ids
    assert inputs["input_ids"].tolist() == [cat, [EOS] * 3 + ox, [EOS] * 5]
    assert inputs["attention_mask"].tolist() == [[1] * 5, [0, 0, 0, 1, 1], [0] * 5]
    assert "labels" not in inputs
    assert tiny_processor(text="")["input_ids"].shape == (1, 0)


def test_long_captions_are_cut(tiny_processor):
    inputs = tiny_processor(text=["a cat", "ox"], return_labels=True, max_length=4)
    assert inputs["input_ids"].shape == (2, 4)
    assert inputs["input_ids"][0].tolist() == tiny_processor.tokenizer("a ca").input_ids


@pytest.mark.parametrize("caption", ["A cat.", "naïve café, 猫が好き 🐈", " two  spaces ", "don't"])
def test_captions_are_decoded_unchanged(tiny_processor, caption):
    ids = tiny_processor(text=caption, return_labels=True)["input_ids"]
    assert tiny_processor.batch_decode(ids) == [caption.strip()]
    assert tiny_processor.decode(ids[0]) == caption.strip()
    assert tiny_processor.decode(ids) == tiny_processor.batch_decode(ids)


def test_no_begin_of_text_token_is_added():
    """Llama's tokenizer adds one. After the image's prefix it would be noise."""
    processor = VLVProcessor(tiny.encoder_tokenizer())  # <s> ... </s>
    inputs = processor(text="ox", return_labels=True)
    ox = processor.tokenizer("ox", add_special_tokens=False).input_ids
    assert inputs["input_ids"].tolist() == [[*ox, processor.tokenizer.eos_token_id]]


def test_images_and_text_together(tiny_processor):
    inputs = tiny_processor(images=tiny.images(2), text=["a", "b"], return_labels=True)
    assert inputs.keys() == {"pixel_values", "input_ids", "attention_mask", "labels"}
    assert set(inputs) <= set(tiny_processor.model_input_names)


def test_inputs_that_cannot_be_processed_are_refused(tiny_processor, tmp_path):
    with pytest.raises(ValueError, match="give images, text, or both"):
        tiny_processor()
    with pytest.raises(ValueError, match="return_tensors is 'np'"):
        tiny_processor(images=tiny.images(1), return_tensors="np")
    for nothing in ({"images": []}, {"text": []}):
        with pytest.raises(ValueError, match="Nothing to process: give images, text, or both"):
            tiny_processor(**nothing)
    with pytest.raises(FileNotFoundError, match=r"missing\.png: there is no such file"):
        tiny_processor(images=[tiny.images(1)[0], tmp_path / "missing.png"])


def test_a_repository_folder_may_be_a_path_object(tiny_repo):
    assert isinstance(VLVProcessor.from_pretrained(Path(tiny_repo)), VLVProcessor)
