"""`vlv caption` as a user runs it."""

import json
import os
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pyarrow.parquet
import pytest
import tiny
from PIL import Image

from vlv.cli import main

LENGTH = "12"


def _run(*arguments, **kwargs):
    command = [sys.executable, "-m", "vlv", "caption", *map(str, arguments), "--max_new_tokens", LENGTH]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **kwargs)


def _expected(model, image):
    """The caption of one image alone, directly from the model."""
    inputs = tiny.processor()(images=image)
    ids = model.generate(**inputs, max_new_tokens=int(LENGTH), do_sample=False)
    return tiny.processor().batch_decode(ids)[0]


def _every_kind_of_image(folder):
    """One picture in every mode of image files, each with the RGB image that a person sees."""
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
    exif[0x0112] = 6  # the camera was turned: show it turned clockwise by a quarter
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


@pytest.mark.slow
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
    # Each caption is the same as for the image alone, whatever the other images in its batch.
    expected = {name: _expected(tiny_model, image) for name, image in seen.items()}
    assert {row["file_name"]: row["text"] for row in rows} == expected
    assert len(set(expected.values())) > 5  # captions differ, so the comparison means something
    for name in broken | {"missing.png"}:
        assert f"vlv caption: left out: {folder / name}: " in result.stderr
    report = output.with_name("captions.jsonl.failures.jsonl")
    failures = {row["file_name"]: row["error"] for row in map(json.loads, report.read_text("utf-8").splitlines())}
    assert failures.keys() == broken | {"missing.png"}
    assert all(reason.startswith(f"{folder / name}: ") for name, reason in failures.items())
    assert f"{len(seen)} captioned, {len(failures)} left out, listed in {report}" in result.stderr.splitlines()[-1]
    assert set(output.parent.iterdir()) == {output, report, output.with_name(".captions.jsonl.settings")}


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
    arguments = ["--max_new_tokens", "7", "--num-beams", "3", "--device", "cpu", "--compile"]
    assert main(["caption", str(tmp_path / "a.png"), "--model", str(tiny_repo), *arguments]) == 0
    ids = tiny_model.generate(**tiny.processor()(images=image), max_new_tokens=7, num_beams=3, do_sample=False)
    expected = " ".join(tiny.processor().batch_decode(ids)[0].split())
    assert capsys.readouterr().out == f"a.png\t{expected}\n"


def _caption(tiny_repo, *arguments):
    return main(["caption", *map(str, arguments), "--model", str(tiny_repo), "--max_new_tokens", LENGTH])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    for name, image in zip(["a.png", "b.png", "sub/c.png"], tiny.images(3), strict=True):
        image.save(folder / name)
    return folder


@pytest.fixture(scope="module")
def captions(photos, tiny_model):
    return {name: _expected(tiny_model, Image.open(photos / name)) for name in ("a.png", "b.png", "sub/c.png")}


def test_parquet(tiny_repo, photos, captions, tmp_path):
    from datasets import load_dataset

    output = tmp_path / "captions.parquet"
    assert _caption(tiny_repo, photos, "--output", output) == 0
    rows = load_dataset("parquet", data_files=str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert dict(zip(rows["file_name"], rows["text"], strict=True)) == captions


def test_several_captions_of_an_image_are_a_list(tiny_repo, photos, tmp_path):
    for suffix in ("jsonl", "parquet"):
        assert (
            _caption(tiny_repo, photos, "--num_captions", 2, "--num_beams", 3, "--output", tmp_path / f"c.{suffix}")
            == 0
        )
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text("utf-8").splitlines()]
    assert pyarrow.parquet.read_table(tmp_path / "c.parquet").to_pylist() == rows
    for row in rows:
        assert len(set(row["text"])) == 2


@pytest.fixture
def own_photos(photos, tmp_path):
    return shutil.copytree(photos, tmp_path / "photos")


def test_sidecars(tiny_repo, own_photos, captions, capsys):
    kept = own_photos / "a.txt"
    kept.write_text("by hand")
    assert _caption(tiny_repo, own_photos, "--output", ".txt") == 0
    assert kept.read_text() == "by hand"
    for name in ("b.png", "sub/c.png"):
        assert (own_photos / name).with_suffix(".txt").read_text("utf-8") == " ".join(captions[name].split()) + "\n"
    assert len(list(own_photos.rglob("*"))) == 3 + 1 + 3 + 1  # and .captions.txt.settings, but nothing else
    assert "2 captioned, 0 left out" in capsys.readouterr().err
    assert _caption(tiny_repo, own_photos, "--output", ".txt", "--existing", "overwrite") == 0
    assert kept.read_text("utf-8") == " ".join(captions["a.png"].split()) + "\n"
    assert "3 captioned" in capsys.readouterr().err


def test_sidecars_of_several_captions_have_a_line_each(tiny_repo, own_photos):
    assert _caption(tiny_repo, own_photos, "--output", ".caption", "--num_beams", 2, "--num_captions", 2) == 0
    lines = (own_photos / "a.caption").read_text("utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 2


def test_sidecars_that_two_images_would_share(tiny_repo, own_photos, capsys):
    (own_photos / "a.bmp").write_bytes((own_photos / "a.png").read_bytes())
    assert _caption(tiny_repo, own_photos, "--output", ".txt") == 2
    assert f"would share the sidecar {own_photos / 'a.txt'}" in capsys.readouterr().err
    assert not (own_photos / "b.txt").exists()


def test_rows_of_tables_have_no_sidecars(tiny_repo, tmp_path, capsys):
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"", b""]}), tmp_path / "images.parquet")
    assert _caption(tiny_repo, tmp_path / "images.parquet", "--output", ".txt") == 2
    assert "--output .txt needs image files" in capsys.readouterr().err


@pytest.mark.slow
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
    arguments = ["--model", str(tiny_repo), "--output", str(output), "--overwrite"]
    assert main(["caption", str(tmp_path / "text.png"), *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "vlv caption: error: None of the images could be read."
    assert output.read_text() == "kept"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["missing.png"], "missing.png: there is no such file."),
        (["."], ".: there are no images in this folder"),
        ([], "the following arguments are required: PATH"),
        (["a.png", "--batch_size", "0"], "--batch_size is 0; it must be at least 1, or auto."),
        (["a.png", "--num_queries", "0"], "--num_queries is 0; it must be at least 1."),
        (["a.png", "--num_beams", "many"], "invalid int value: 'many'"),
        (["a.png", "--output", "captions.csv"], "must end in .jsonl"),
        (["a.png", "--num_captions", "3"], "--num_captions 3 needs as many --num_beams, or a --temperature above 0."),
        (["a.png", "--temperature", "1", "--num_beams", "2"], "choose one"),
        (["a.png", "--min_new_tokens", "9", "--max_new_tokens", "8"], "--min_new_tokens 9 is more than"),
        (["ada/nothing"], "ada/nothing: there is no such file or folder, and no such dataset"),
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


def test_more_queries_than_the_checkpoint_has(tiny_repo, tmp_path, capsys):
    tiny.images(1)[0].save(tmp_path / "a.png")
    capsys.readouterr()
    assert main(["caption", str(tmp_path / "a.png"), "--model", str(tiny_repo), "--num_queries", "11"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("num_queries is 11, but this checkpoint has 10 queries: choose between 1 and 10.")


def test_checkpoint_without_a_caption_head(tiny_processor, tmp_path, capsys):
    tiny.model(caption_config=None).save_pretrained(tmp_path / "stage1")
    tiny_processor.save_pretrained(tmp_path / "stage1")
    tiny.images(1)[0].save(tmp_path / "a.png")
    capsys.readouterr()
    assert main(["caption", str(tmp_path / "a.png"), "--model", str(tmp_path / "stage1")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "stage1 has no caption head and cannot caption: train one" in line
