"""`vlv score` and `vlv caption --best_of` as a user runs them."""

import json
import os
import shutil
import signal
import subprocess
import sys

import datasets
import pytest
import tiny
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

from modeling_vlv import VLVForConditionalGeneration, VLVModel
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.cli import main
from vlv.judging.judge import Judge
from vlv.judging.scores import value_of
from vlv.models.loading import load_captioner

TEXTS = ["a cat", "two dogs", "sky", "a longer caption, which needs two windows"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(tiny.images(len(TEXTS))):
        image.save(folder / f"{number}.png")
    return folder


@pytest.fixture
def dataset(photos):
    """The photos with captions, a damaged image, and images without a caption."""
    rows = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(TEXTS)]
    (photos / "damaged.png").write_text("no image")
    tiny.images(1)[0].save(photos / "empty.png")
    tiny.images(1)[0].save(photos / "missing.png")
    rows += [{"file_name": "damaged.png", "text": "a"}, {"file_name": "empty.png", "text": " "}]
    rows += [{"file_name": "missing.png"}]
    _write(photos / "metadata.jsonl", rows)
    return photos


def _write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def _score(repo, dataset, output, *options):
    return main(list(map(str, ["score", dataset, "--model", repo, "--output", output, *options])))


@pytest.fixture(scope="module")
def truth():
    """The scores of the four pairs, from the judge itself."""
    judge = Judge(tiny.model(), tiny.processor(), ["explained", "likelihood"])
    scores = judge([judge.read(image) for image in tiny.images(len(TEXTS))], [[text] for text in TEXTS])
    return [of for (of,) in scores]


def _check(rows, truth):
    assert [row["text"] for row in rows] == TEXTS
    for row, scores in zip(rows, truth, strict=True):
        assert {name: row[name] for name in scores} == pytest.approx(scores, abs=1e-4)


def test_scores_and_failures(tiny_repo, dataset, truth, tmp_path, capsys):
    output = tmp_path / "scores.jsonl"
    assert _score(tiny_repo, dataset, output) == 0
    rows = _rows(output)
    assert [row["file_name"] for row in rows] == ["0.png", "1.png", "2.png", "3.png"]
    assert list(rows[0]) == ["file_name", "text", "explained", "likelihood"]
    _check(rows, truth)
    failures = {row["file_name"]: row["error"] for row in _rows(tmp_path / "scores.jsonl.failures.jsonl")}
    assert failures.keys() == {"damaged.png", "empty.png", "missing.png"}
    assert failures["empty.png"] == "empty.png: there is no caption."
    assert "damaged.png" in failures["damaged.png"]
    assert "vlv score: 4 scored, 3 left out, listed in" in capsys.readouterr().err
    assert main(["score", str(dataset), "--model", str(tiny_repo), "--output", str(output)]) == 2
    assert "already exists: add to it with --resume" in capsys.readouterr().err


def test_captions_of_any_origin(tiny_repo, photos, truth, tmp_path):
    for number, text in enumerate(TEXTS):
        (photos / f"{number}.txt").write_text(text)
    assert _score(tiny_repo, photos, tmp_path / "sidecars.jsonl") == 0
    _check(_rows(tmp_path / "sidecars.jsonl"), truth)
    rows = {"image": [str(photos / f"{number}.png") for number in range(len(TEXTS))], "caption": TEXTS}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    (tmp_path / "table").mkdir()
    table.to_parquet(tmp_path / "table" / "train.parquet")
    options = ("--caption_column", "caption", "--keep", "0.5")
    assert _score(tiny_repo, tmp_path / "table", tmp_path / "table.jsonl", *options) == 0
    _check(_rows(tmp_path / "table.jsonl"), truth)
    kept = _rows(tmp_path / "table.kept" / "metadata.jsonl")
    assert len(kept) == 2
    for row in kept:
        with Image.open(tmp_path / "table.kept" / row["file_name"]) as image:
            assert image.format == "PNG"
    for text in photos.glob("*.txt"):
        text.unlink()
    # Captions in a file elsewhere, in another order, with one of an image that is not there.
    rows = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate([*TEXTS, "?"])]
    datasets.Dataset.from_list(rows[::-1]).to_parquet(tmp_path / "captions.parquet")
    assert _score(tiny_repo, photos, tmp_path / "file.jsonl", "--captions", tmp_path / "captions.parquet") == 0
    _check(_rows(tmp_path / "file.jsonl"), truth)


def test_several_captions_of_an_image_have_lists(tiny_repo, photos, truth, tmp_path):
    _write(photos / "metadata.jsonl", [{"file_name": "0.png", "text": ["a cat", "", "sky"]}])
    assert _score(tiny_repo, photos, tmp_path / "scores.jsonl", "--num_workers", 0) == 0
    (row,) = _rows(tmp_path / "scores.jsonl")
    assert row["text"] == ["a cat", "sky"]
    assert row["explained"][0] == pytest.approx(truth[0]["explained"], abs=1e-4)
    assert len(row["likelihood"]) == 2


def test_the_best_are_kept_and_the_worst_shown(tiny_repo, dataset, tmp_path, truth):
    output, sheet = tmp_path / "scores.jsonl", tmp_path / "worst.png"
    assert _score(tiny_repo, dataset, output) == 0
    (dataset / "metadata.jsonl").touch()
    options = ["--resume", "--keep", "0.75", "--by", "explained", "--sheet", sheet]
    assert _score(tiny_repo, dataset, output, *options) == 0
    kept = tmp_path / "scores.kept"
    worst = min(range(len(TEXTS)), key=lambda number: truth[number]["explained"])
    assert {row["file_name"] for row in _rows(kept / "metadata.jsonl")} == {
        f"{number}.png" for number in range(len(TEXTS)) if number != worst
    }
    for row in _rows(kept / "metadata.jsonl"):
        assert (kept / row["file_name"]).read_bytes() == (dataset / row["file_name"]).read_bytes()
    with Image.open(sheet) as picture:
        assert picture.width > 1000
    assert len(datasets.load_dataset("imagefolder", data_dir=str(kept), split="train")) == 3
    assert _score(tiny_repo, dataset, output, *options) == 2  # the folder is not overwritten


def test_the_round_trip_compares_what_the_decoder_draws(tiny_repo, photos, tmp_path):
    vision = tmp_path / "vision"
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    Dinov2Model(config).save_pretrained(vision)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(vision)
    _write(photos / "metadata.jsonl", [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(TEXTS)])
    options = ["--feature_extractor", vision, "--scores", "round_trip"]
    assert _score(tiny_repo, photos, tmp_path / "scores.jsonl", *options) == 0
    rows = _rows(tmp_path / "scores.jsonl")
    assert all(-1 <= row["round_trip"] <= 1 and "explained" not in row for row in rows)


def test_what_a_model_lacks_is_said(photos, tmp_path, capsys, caplog):
    _write(photos / "metadata.jsonl", [{"file_name": "0.png", "text": "a cat"}])
    repo = tmp_path / "captioner"
    tiny.model(VLVForConditionalGeneration).save_pretrained(repo)
    tiny.processor().save_pretrained(repo)
    assert _score(repo, photos, tmp_path / "scores.jsonl") == 0
    assert list(_rows(tmp_path / "scores.jsonl")[0]) == ["file_name", "text", "likelihood"]
    assert "has no diffusion decoder, so the scores have no explained." in caplog.text
    assert _score(repo, photos, tmp_path / "other.jsonl", "--scores", "explained") == 2
    assert "has no diffusion decoder, so it cannot compute explained" in capsys.readouterr().err
    assert main(["caption", str(photos), "--model", str(repo), "--num_captions", "2", "--best_of", "both"]) == 2
    assert "has no diffusion decoder, so it cannot compute explained" in capsys.readouterr().err
    headless = tmp_path / "headless"
    tiny.model(VLVModel, caption_config=None).save_pretrained(headless)
    tiny.processor().save_pretrained(headless)
    assert _score(headless, photos, tmp_path / "headless.jsonl") == 0
    assert list(_rows(tmp_path / "headless.jsonl")[0]) == ["file_name", "text", "explained"]


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--keep", "1.5"], "--keep is 1.5; it is a share"),
        (["--num_draws", "0"], "--num_draws is 0; it must be at least 1."),
        (["--scores", "round_trip"], "--scores round_trip needs --feature_extractor."),
        (["--sheet", "sheet.txt"], "--sheet sheet.txt must end in .png"),
        (["--scores", "likelihood", "--keep", "0.9", "--by", "both"], "--by both needs the score explained"),
        (["--captions", "nothing.jsonl"], "There is no file of captions nothing.jsonl"),
        (["--caption_column", "title"], "has no captions: no column 'title'"),
        (["--output", "scores.csv"], "must end in .jsonl"),
    ],
)
def test_wrong_arguments_are_one_sentence(tiny_repo, dataset, tmp_path, capsys, options, sentence):
    assert _score(tiny_repo, dataset, tmp_path / "scores.jsonl", *options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert sentence in line
    assert not (tmp_path / "scores.jsonl").exists()


def test_images_without_any_caption(tiny_repo, photos, tmp_path, capsys):
    assert _score(tiny_repo, photos, tmp_path / "scores.jsonl") == 2
    assert "has no captions" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_loses_nothing(tiny_repo, dataset, tmp_path, truth):
    output = tmp_path / "scores.jsonl"
    command = [sys.executable, "-c", KILLED, "score", dataset, "--model", tiny_repo, "--output", output]
    process = subprocess.run([*map(str, command), "--batch_size", "2"], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL
    (journal,) = tmp_path.glob(".scores.jsonl.partial/*.jsonl")
    assert len(journal.read_text().splitlines()) == 3  # the header and a batch of two
    assert _score(tiny_repo, dataset, output, "--resume") == 0
    _check(_rows(output), truth)


# Runs the command, and kills it when it begins with its second batch.
KILLED = """
import itertools, os, signal, sys
from vlv.cli import main
from vlv.judging.judge import Judge
rows, batches = Judge.rows, itertools.count()
def doomed(self, batch):
    if next(batches) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return rows(self, batch)
Judge.rows = doomed
main(sys.argv[1:])
"""


@pytest.mark.parametrize("by", ["explained", "likelihood", "both"])
def test_best_of_keeps_the_caption_with_the_best_score(tiny_repo, photos, tmp_path, by):
    for name in ("2.png", "3.png"):
        os.unlink(photos / name)
    output = tmp_path / "captions.jsonl"
    options = ["--num_captions", "4", "--best_of", by, "--max_new_tokens", "6", "--output", str(output)]
    assert main(["caption", str(photos), "--model", str(tiny_repo), *options]) == 0
    model, processor = tiny.model(), tiny.processor()
    captioner = Captioner(model, processor, Decoding(max_new_tokens=6, num_captions=4, temperature=1.0))
    judge = Judge(model, processor, ["explained", "likelihood"])
    images = tiny.images(len(TEXTS))[:2]
    names = ["0.png", "1.png"]
    written = [
        [it.text for it in captions] for _, captions in captioner.caption_images(zip(names, images, strict=True))
    ]
    scores = judge([judge.read(image) for image in images], written)
    expected = [
        max(zip(texts, of, strict=True), key=lambda pair: value_of(pair[1], by))[0]
        for texts, of in zip(written, scores, strict=True)
    ]
    assert [row["text"] for row in _rows(output)] == expected


@torch.no_grad()
def test_best_of_judges_a_caption_after_its_prompt(prompted_repo, photos, tmp_path):
    output, count = tmp_path / "captions.jsonl", 6
    options = ["--style", "short", "--num_captions", str(count), "--best_of", "likelihood", "--max_new_tokens", "6"]
    assert main(["caption", str(photos), "--model", str(prompted_repo), *options, "--output", str(output)]) == 0
    model, processor = load_captioner(str(prompted_repo), "cpu")
    decoding = Decoding(max_new_tokens=6, num_captions=count, temperature=1.0, style="short")
    names, images = [f"{number}.png" for number in range(len(TEXTS))], tiny.images(len(TEXTS))

    def likelihood(image, prompt, text):
        tokens = processor(text=text, prompt=prompt, return_labels=True)
        return -float(model(pixel_values=processor(images=image)["pixel_values"], **tokens).caption_loss)

    expected, without = [], []
    captions = Captioner(model, processor, decoding).caption_images(zip(names, images, strict=True))
    for (_, drawn), image in zip(captions, images, strict=True):
        texts = [it.text for it in drawn]
        expected.append(max(texts, key=lambda text: likelihood(image, "Be brief.", text)))
        without.append(max(texts, key=lambda text: likelihood(image, None, text)))
    assert [row["text"] for row in _rows(output)] == expected != without


def test_best_of_needs_several_captions(tiny_repo, photos, capsys):
    assert main(["caption", str(photos), "--best_of", "both"]) == 2
    assert "--best_of both needs several captions to choose from" in capsys.readouterr().err
    shutil.rmtree(photos)
