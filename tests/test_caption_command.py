"""`vlv caption` as a user runs it."""

import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tiny
from PIL import Image

from vlv.cli import main

LENGTH = "12"


def _run(*arguments, **kwargs):
    command = [sys.executable, "-m", "vlv", "caption", *map(str, arguments), "--max_new_tokens", LENGTH]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **kwargs)


def _expected(model, image):
    """The caption of one image alone, straight from the model."""
    inputs = tiny.processor()(images=image)
    ids = model.generate(**inputs, max_new_tokens=int(LENGTH), do_sample=False)
    return tiny.processor().batch_decode(ids)[0]


def _every_kind_of_image(folder):
    """One picture in every mode that image files come in, each with what a person sees in it, as RGB."""
    (picture,) = tiny.images(1, size=(40, 30))
    (other,) = tiny.images(1, seed=1, size=(40, 30))
    grey = picture.convert("L")
    black = Image.new("RGB", picture.size)
    seen = {}

    def save(name, image, sees, **options):
        image.save(folder / name, **options)
        seen[name] = sees

    save("rgb.png", picture, picture)
    save("grey.png", grey, grey.convert("RGB"))
    save("palette.png", black.quantize(4), black)
    save("16-bit.png", Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), grey.convert("RGB"))
    transparent = picture.copy()
    transparent.putalpha(0)
    save("transparent.png", transparent, Image.new("RGB", picture.size, "white"))
    save("cmyk.tif", picture.convert("CMYK"), picture.convert("CMYK").convert("RGB"))
    save("animated.webp", picture, picture, save_all=True, append_images=[other], lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: to be shown a quarter turn clockwise
    save("rotated.png", picture, picture.transpose(Image.Transpose.ROTATE_270), exif=exif)
    save("one pixel.png", Image.new("RGB", (1, 1), "red"), Image.new("RGB", (1, 1), "red"))
    save("schön/ünï.png", other, other)
    return seen


def _broken_images(folder):
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("no image")
    whole = (folder / "rgb.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    # A decompression bomb: a few bytes that claim to be 30,000 x 30,000 pixels.
    header = b"\x89PNG\r\n\x1a\n" + b"\x00\x00\x00\rIHDR" + (30000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    (folder / "bomb.png").write_bytes(header + zlib.crc32(header[12:]).to_bytes(4, "big"))
    return {"empty.jpg", "text.png", "cut.png", "bomb.png"}


def test_folder_of_every_kind_of_image(tiny_repo, tiny_model, tmp_path):
    folder = tmp_path / "photos"
    (folder / "schön").mkdir(parents=True)
    seen = _every_kind_of_image(folder)
    broken = _broken_images(folder)
    output = tmp_path / "out" / "captions.jsonl"
    result = _run(folder, folder / "missing.png", "--model", tiny_repo, "--output", output, "--batch_size", "3")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["file_name"] for row in rows] == sorted(seen)
    # Each caption is the one that the image gets alone, whatever shared its batch.
    expected = {name: _expected(tiny_model, image) for name, image in seen.items()}
    assert {row["file_name"]: row["text"] for row in rows} == expected
    assert len(set(expected.values())) > 5  # the images are told apart, so the comparison means something
    for name in broken | {"missing.png"}:
        assert f"vlv caption: left out: {folder / name}: " in result.stderr
    assert list(output.parent.iterdir()) == [output]


def test_prints_captions_without_output(tiny_repo, tiny_model, tmp_path, capsys):
    images = tiny.images(2)
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    assert main(["caption", str(tmp_path), "--model", str(tiny_repo), "--max_new_tokens", LENGTH]) == 0
    lines = [f"{number}.png\t{' '.join(_expected(tiny_model, image).split())}" for number, image in enumerate(images)]
    assert capsys.readouterr().out.splitlines() == lines


def test_output_in_the_folder_makes_it_an_imagefolder(tiny_repo, tmp_path):
    from datasets import load_dataset

    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name, image in zip(["a.png", "sub/b.png"], tiny.images(2), strict=True):
        image.save(folder / name)
    metadata = folder / "metadata.jsonl"
    assert (
        main(["caption", str(folder), "--model", str(tiny_repo), "--output", str(metadata), "--max_new_tokens", "5"])
        == 0
    )
    rows = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.num_rows == 2 and all(isinstance(text, str) for text in rows["text"])


def test_options_reach_the_model(tiny_repo, tiny_model, tmp_path, capsys):
    (image,) = tiny.images(1)
    image.save(tmp_path / "a.png")
    arguments = ["--max_new_tokens", "7", "--num-beams", "3", "--device", "cpu"]
    assert main(["caption", str(tmp_path / "a.png"), "--model", str(tiny_repo), *arguments]) == 0
    ids = tiny_model.generate(**tiny.processor()(images=image), max_new_tokens=7, num_beams=3, do_sample=False)
    expected = " ".join(tiny.processor().batch_decode(ids)[0].split())
    assert capsys.readouterr().out == f"a.png\t{expected}\n"


def test_captions_without_a_network(tiny_repo, tmp_path):
    tiny.images(1)[0].save(tmp_path / "a.png")
    code = (
        "import socket, sys\n"
        "def refuse(*_): sys.exit('the network was used')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from vlv.cli import main\n"
        f"sys.exit(main(['caption', {str(tmp_path)!r}, '--model', {str(tiny_repo)!r}, '--max_new_tokens', '3']))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_nothing_readable(tiny_repo, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    output = tmp_path / "captions.jsonl"
    output.write_text("kept")
    assert main(["caption", str(tmp_path / "text.png"), "--model", str(tiny_repo), "--output", str(output)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "vlv caption: error: None of the images could be read."
    assert output.read_text() == "kept"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["missing.png"], "missing.png: there is no such file."),
        (["."], ".: there are no images in this folder"),
        ([], "the following arguments are required: PATH"),
        (["a.png", "--batch_size", "0"], "--batch_size is 0; it must be at least 1."),
        (["a.png", "--num_beams", "many"], "invalid int value: 'many'"),
        (["a.png", "--output", "captions.csv"], "must end in .jsonl"),
    ],
)
def test_wrong_arguments(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["caption", *arguments])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vlv caption: error: ") and sentence in line


def test_checkpoint_without_a_caption_head(tiny_processor, tmp_path, capsys):
    tiny.model(caption_config=None).save_pretrained(tmp_path / "stage1")
    tiny_processor.save_pretrained(tmp_path / "stage1")
    tiny.images(1)[0].save(tmp_path / "a.png")
    capsys.readouterr()
    assert main(["caption", str(tmp_path / "a.png"), "--model", str(tmp_path / "stage1")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "stage1 has no caption head and cannot caption: train one" in line
