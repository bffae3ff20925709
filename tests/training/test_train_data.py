"""The data of `vlv train`: every kind of dataset, captions in lists, broken files, and caches on disk."""

import functools
import itertools
import json
import tarfile

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from matplotlib.cbook import get_sample_data
from PIL import Image
from running_train import arguments, losses, run

from vlv.cli import main as vlv
from vlv.data.rows import load_rows, open_image
from vlv.training.examples import Stream, draw_captions
from vlv.training.recipe import read_recipe
from vlv.training.trainer import StageTrainer

AUTOENCODE, CAPTION = "tiny/autoencode", "tiny/caption"
COUNT = 16
CAPTIONS = [f"picture {number}" for number in range(COUNT)]


def make_stage(recipe, output_dir, **settings):
    stage_type, settings, args = read_recipe(arguments(recipe, output_dir, **settings))
    stage = stage_type(settings, args)
    stage.prepare()
    return stage


def captions_in(stage, batch):
    """The captions of a batch of samples."""
    return stage.processor.batch_decode(stage.collate(batch)["input_ids"])


# ---- kinds of datasets ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    return tiny.images(COUNT)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, pictures):
    """The same pictures and captions as every kind of dataset: its path, and the names of its two columns."""
    folder = tmp_path_factory.mktemp("kinds")
    files = folder / "imagefolder"
    files.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(files / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(CAPTIONS[number])
    rows = [{"file_name": f"{number:02}.png", "text": caption} for number, caption in enumerate(CAPTIONS)]
    (files / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    (folder / "webdataset").mkdir()
    for part in range(2):
        with tarfile.open(folder / "webdataset" / f"{part}.tar", "w") as tar:
            for number in range(part, COUNT, 2):
                tar.add(files / f"{number:02}.png", f"{number:02}.png")
                tar.add(folder / f"{number:02}.txt", f"{number:02}.txt")

    table = Dataset.from_dict({"picture": pictures, "says": CAPTIONS}).cast_column("picture", ImageFeature())
    (folder / "parquet").mkdir()
    table.to_parquet(folder / "parquet" / "0.parquet")
    table.save_to_disk(folder / "saved")
    return {
        "imagefolder": (files, "image", "text"),
        "webdataset": (folder / "webdataset", "png", "txt"),
        "parquet": (folder / "parquet", "picture", "says"),
        "saved": (folder / "saved", "picture", "says"),
    }


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("kind", ["imagefolder", "webdataset", "parquet", "saved", "hub"])
def test_every_kind_of_dataset_has_the_same_rows(kind, streaming, kinds, pictures, monkeypatch):
    if kind == "hub":
        folder, image, text = kinds["parquet"]
        on_disk = functools.partial(load_dataset, "parquet", data_dir=str(folder))
        monkeypatch.setattr("vlv.data.rows.load_dataset", lambda name, **kw: {"ada/pictures": on_disk}[name](**kw))
        dataset = "ada/pictures"
    else:
        dataset, image, text = kinds[kind]
    rows = load_rows(str(dataset), streaming=streaming)
    found = {row[text]: open_image(row[image]).tobytes() for row in rows}
    assert found == {caption: picture.tobytes() for caption, picture in zip(CAPTIONS, pictures, strict=True)}


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
@pytest.mark.slow
def test_columns_can_be_named_and_an_epoch_has_all_rows_that_are_not_held_out(
    kind, streaming, kinds, tiny_repo, tmp_path
):
    dataset, image_column, caption_column = kinds[kind]
    stage = make_stage(
        CAPTION,
        tmp_path,
        dataset=dataset,
        model=tiny_repo,
        image_column=image_column,
        caption_column=caption_column,
        streaming=streaming,
        shuffle_buffer_size=4,
        eval_size=4,
    )
    held_out = captions_in(stage, stage.eval_dataset[:])
    assert len(held_out) == 4
    args = stage.args
    args.dataloader_drop_last, args.per_device_train_batch_size = True, 3
    batches = StageTrainer(stage, args).get_train_dataloader()
    epochs = [list(itertools.islice(batches, 4)) for _ in range(2)]
    for epoch in epochs:
        said = [caption for batch in epoch for caption in stage.processor.batch_decode(batch["input_ids"])]
        assert sorted(said + held_out) == sorted(CAPTIONS)


def test_processes_share_a_stream_and_shuffle_it_again(kinds):
    dataset, image, text = kinds["saved"]

    def read(row):
        return {"said": row[text]}

    def epochs(rank):
        rows = load_rows(str(dataset), streaming=True)
        samples = iter(Stream(rows, read, None, image, set(), seed=1, shuffle_buffer_size=4, rank=rank, world_size=2))
        return [[sample["said"] for sample in itertools.islice(samples, COUNT // 2)] for _ in range(2)]

    (first, second), (other_first, other_second) = epochs(0), epochs(1)
    assert sorted(first + other_first) == sorted(second + other_second) == sorted(CAPTIONS)
    assert first != second
    assert epochs(0) == [first, second]


# ---- captions --------------------------------------------------------------------------------------------------


def test_one_of_several_captions_is_drawn_per_epoch(pictures, tiny_repo, tmp_path):
    several = [[f"{number} one", f"{number} two", ""] for number in range(COUNT - 3)]
    several += [None, [], ["  "]]
    rows = Dataset.from_dict({"image": pictures, "text": several}).cast_column("image", ImageFeature())
    rows.save_to_disk(tmp_path / "rows")
    stage = make_stage(CAPTION, tmp_path / "out", dataset=tmp_path / "rows", model=tiny_repo, eval_size=1, seed=3)
    data = stage.train_dataset

    def epoch(number):
        data.set_epoch(number)
        return draw_captions(data[:])

    drawn = [epoch(number) for number in range(12)]
    for captions in zip(*drawn, strict=True):  # the captions of one image in all epochs
        number = captions[0].split()[0]
        assert set(captions) == {f"{number} one", f"{number} two"}
    assert epoch(5) == drawn[5]

    left_out = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert sorted(entry["row"] for entry in left_out) == [13, 14, 15]
    assert {entry["error"] for entry in left_out} == {"there is no caption."}


def test_captions_are_padded_to_the_longest_of_the_batch_and_grouped_by_length(pictures, tiny_repo, tmp_path):
    captions = [" ".join(["long"] * (1 + number % 8)) for number in range(4 * COUNT)]
    rows = Dataset.from_dict({"image": 4 * pictures, "text": captions}).cast_column("image", ImageFeature())
    rows.save_to_disk(tmp_path / "rows")

    def padding(strategy):
        settings = {"per_device_train_batch_size": 2, "eval_size": 2, "train_sampling_strategy": strategy}
        stage = make_stage(CAPTION, tmp_path / strategy, dataset=tmp_path / "rows", model=tiny_repo, **settings)
        masks = [batch["attention_mask"] for batch in StageTrainer(stage, stage.args).get_train_dataloader()]
        assert len(masks) == 31
        assert all(mask.sum(1).max() == mask.shape[1] for mask in masks)
        return sum((1 - mask).sum().item() for mask in masks)

    assert padding("group_by_length") < padding("random") / 2


# ---- files that cannot be read ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A photograph and a drawing in all common modes, sizes and orientations, and three broken files."""
    folder = tmp_path_factory.mktemp("mixed")
    with get_sample_data("grace_hopper.jpg") as file:
        photo = Image.open(file).convert("RGB").resize((128, 150))
    drawing = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    drawing.paste((200, 30, 40, 255), (10, 5, 50, 30))
    turned = Image.Exif()
    turned[274] = 6  # the camera was held upright
    photo.save(folder / "photo.jpg")
    photo.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=turned, quality=95)
    photo.convert("CMYK").save(folder / "print.jpg")
    photo.convert("L").save(folder / "grey.png")
    photo.convert("P").save(folder / "palette.gif")
    photo.convert("1").save(folder / "fax.tiff")
    Image.fromarray(np.asarray(photo.convert("L"), np.uint16) * 257).save(folder / "sixteen.png")
    drawing.save(folder / "transparent.png")
    drawing.convert("LA").save(folder / "grey-transparent.png")
    drawing.convert("P").save(folder / "palette-transparent.png", transparency=0)
    drawing.convert("RGB").resize((300, 7)).save(folder / "wide.webp")
    drawing.convert("RGB").resize((1, 1)).save(folder / "dot.bmp")

    (folder / "cut.png").write_bytes((folder / "sixteen.png").read_bytes()[:2000])
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_text("<html>404 Not Found</html>")
    rows = [{"file_name": path.name, "text": f"this is {path.name}"} for path in sorted(folder.iterdir())]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


BROKEN = {"cut.png", "empty.jpg", "page.jpg"}


@pytest.mark.parametrize(
    ("recipe", "streaming"),
    [
        pytest.param(AUTOENCODE, False, id="stage1-map", marks=pytest.mark.slow),
        pytest.param(AUTOENCODE, True, id="stage1-stream", marks=pytest.mark.slow),
        pytest.param(CAPTION, False, id="stage2-map"),
        pytest.param(CAPTION, True, id="stage2-stream"),
    ],
)
def test_broken_files_are_left_out_and_named(recipe, streaming, mixed, tiny_repo, tmp_path, capsys):
    settings = {"model": tiny_repo, "streaming": streaming, "eval_size": 2, "max_steps": 6}
    assert vlv(["train", *arguments(recipe, tmp_path, dataset=mixed, **settings)]) == 0
    report = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert {entry["file_name"] for entry in report} == BROKEN and len(report) == 3
    assert all(entry["error"] for entry in report)
    assert "3 unusable rows were left out" in capsys.readouterr().out


def test_the_remaining_images_are_whole_and_upright(mixed, tiny_repo, tmp_path):
    stage = make_stage(AUTOENCODE, tmp_path, dataset=mixed, model=tiny_repo, eval_size=4)
    data = stage.train_dataset
    assert len(data) + len(stage.eval_dataset) == 15 - len(BROKEN)

    images = {row["text"].removeprefix("this is "): row["image"] for row in load_rows(str(mixed))}
    pixels = {
        name: stage.processor(images=open_image(image))["pixel_values"]
        for name, image in images.items()
        if name not in BROKEN
    }
    for name in ("turned.jpg", "print.jpg", "palette.gif"):
        assert (pixels[name] - pixels["photo.jpg"]).abs().mean() < 0.25, name
    assert (pixels["sixteen.png"] - pixels["grey.png"]).abs().max() < 0.05


# ---- computed once, kept on disk -------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [AUTOENCODE, CAPTION], ids=["stage1", "stage2"])
@pytest.mark.slow
def test_cached_features_do_not_change_the_losses(recipe, tiny_repo, scenes, tmp_path):
    settings = {"dataset": scenes, "model": tiny_repo, "max_steps": 2}
    settings |= {"cache_latents": True} if recipe == AUTOENCODE else {}
    kept = run(recipe, tmp_path / "kept", **settings, cache_features=True)
    computed = run(recipe, tmp_path / "computed", **settings, cache_features=False)
    assert losses(kept) == pytest.approx(losses(computed), abs=1e-5)
    assert kept["evaluation"]["eval_loss"] == pytest.approx(computed["evaluation"]["eval_loss"], abs=1e-5)


@pytest.mark.slow
def test_a_cache_is_shared_only_by_equal_runs(tiny_repo, scenes, tmp_path):
    settings = {"dataset": scenes, "model": tiny_repo, "cache_dir": tmp_path / "cache", "cache_latents": True}

    def files(**changed):
        make_stage(AUTOENCODE, tmp_path / "out", **{**settings, **changed})
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}

    first = files()
    assert len(first) == 2  # one for the images to train on, and one for the images to evaluate on
    assert files() == first
    other = tmp_path / "other"
    tiny.model(seed=1).save_pretrained(other)
    tiny.processor().save_pretrained(other)
    assert len(files(model=other)) == 4


@pytest.mark.slow
def test_cached_latents_are_the_vaes_and_are_sampled_in_each_epoch(tiny_repo, scenes, tmp_path):
    settings = {"dataset": scenes, "model": tiny_repo, "cache_dir": tmp_path / "cache", "cache_latents": True}
    stage = make_stage(AUTOENCODE, tmp_path, **settings)
    data, (rows, _) = stage.train_dataset, stage.load_data()
    images = torch.stack([stage.reader(["decoder_pixel_values"])(row)["decoder_pixel_values"] for row in rows])
    with torch.no_grad():
        mean = stage.model.encode_latents(images, sample=False)
    unsampled = make_stage(AUTOENCODE, tmp_path, **settings, sample_latents=False)
    torch.testing.assert_close(unsampled.collate(unsampled.train_dataset[:])["latents"], mean, atol=1e-5, rtol=0)

    def epoch(number):
        data.set_epoch(number)
        return stage.collate(data[:])["latents"]

    std = data[:]["latent_std"]
    drawn = (torch.stack([epoch(number) for number in range(100)]) - mean) / std
    assert drawn.mean(0).abs().max() < 0.6 and (drawn.std(0) - 1).abs().max() < 0.5
    assert torch.equal(epoch(3), epoch(3)) and not torch.equal(epoch(3), epoch(4))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [AUTOENCODE, CAPTION], ids=["stage1", "stage2"])
def test_parts_that_moved_to_compute_a_cache_can_be_trained(recipe, tiny_repo, scenes, tmp_path, monkeypatch):
    """On a GPU, computing the cache moves the encoder there, which makes new weights. Here, the first move does so."""
    overwrite, there = torch.__future__.get_overwrite_module_params_on_conversion(), []

    def moved(weight):
        if not any(weight.data_ptr() == other.data_ptr() for other in there):
            weight = weight.clone()
            there.append(weight)
        return weight

    def move(module, *args, **kwargs):
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            return module._apply(moved)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrite)

    monkeypatch.setattr(torch.nn.Module, "to", move)
    settings = {"dataset": scenes, "model": tiny_repo, "max_steps": 2, "cache_features": True}
    settings |= {"train_parts": ["language_model", "prefix_projection"]} if recipe == CAPTION else {}
    assert len(losses(run(recipe, tmp_path, **settings))) == 2
