"""Runs that would train nothing, or nothing useful. Each is refused in one line, or says what it leaves out."""

import json
import sys

import pytest
import tiny
import torch
from running_train import arguments, losses, run
from safetensors.torch import load_file

from vlv.cli import main as vlv
from vlv.files import locked
from vlv.scenes import write_scenes
from vlv.training.caching import Cost, choose
from vlv.training.recipe import read_recipe

AUTOENCODE, CAPTION, LANGUAGE = (f"tiny/{stage}" for stage in ("autoencode", "caption", "language"))


def error_of(capsys, recipe, output_dir, **settings):
    """The one line at the end of a refused run."""
    assert vlv(["train", *arguments(recipe, output_dir, **settings)]) == 2
    told = capsys.readouterr().err
    assert told.count("vlv train: error:") == 1 and "Traceback" not in told
    assert told.splitlines()[-1].startswith("vlv train: error:")  # and not after a progress bar
    return told.splitlines()[-1].removeprefix("vlv train: error: ")


@pytest.fixture
def common(tiny_repo, scenes):
    return {"dataset": scenes, "model": tiny_repo}


# ---- too little data, or too few steps ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"per_device_train_batch_size": 33},
            "has 32 rows to train on after eval_size=8, but one batch takes 33: add",
        ),
        ({"eval_size": 38}, "has 2 rows to train on after eval_size=38, but one batch takes 4"),
        ({"eval_size": 40}, "has 40 rows, of which eval_size=40 are to be held out"),
        ({"eval_size": 40, "streaming": True}, "has 40 rows, of which eval_size=40 are to be held out"),
        ({"eval_size": 0}, "eval_size is 0: evaluate on at least 1 image."),
        ({"max_length": 0}, "max_length is 0: give at least 1."),
        ({"max_length": -3}, "max_length is -3: give at least 1."),
        ({"max_steps": 0}, "max_steps is 0, which trains nothing"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs is 0, which trains nothing"),
        (
            {"streaming": True, "train_sampling_strategy": "group_by_length"},
            "group_by_length needs the lengths of all captions, which streaming does not know",
        ),
        ({"eval_split": "train"}, "The rows to evaluate on are the rows to train on, split 'train' of"),
        ({"eval_split": "train", "streaming": True}, "The rows to evaluate on are the rows to train on"),
    ],
)
def test_too_little_to_train_or_to_evaluate_on(settings, message, common, tmp_path, capsys):
    assert message in error_of(capsys, CAPTION, tmp_path, **common, **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_smaller_batch_or_a_short_last_one_trains(common, tmp_path):
    settings = {"per_device_train_batch_size": 64, "max_steps": 1, "save_strategy": "no", **common}
    assert run(CAPTION, tmp_path, dataloader_drop_last=False, **settings)["steps"] == 1


def test_an_empty_evaluation_folder(common, tmp_path, capsys):
    error = error_of(capsys, CAPTION, tmp_path / "out", eval_dataset=tmp_path, **common)
    assert str(tmp_path) in error


def test_no_part_to_train(common, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stage: caption\ntrain_parts: []\n")
    assert "train_parts is empty" in error_of(capsys, recipe, tmp_path / "out", **common)


@pytest.mark.parametrize(
    ("recipe", "parts", "names"),
    [
        (AUTOENCODE, ["caption_head"], "caption_head"),
        (AUTOENCODE, ["queries", "vae", "prefix_projection"], "prefix_projection, vae"),
        (CAPTION, ["caption_head", "unet"], "unet"),
        (CAPTION, ["vae"], "vae"),
    ],
)
def test_parts_that_the_loss_does_not_reach(recipe, parts, names, common, tmp_path, capsys):
    error = error_of(capsys, recipe, tmp_path, train_parts=parts, **common)
    stage = recipe.removeprefix("tiny/")
    assert error == f"train_parts names {names}, which the loss of stage '{stage}' does not reach: leave it out."


# ---- captions and metadata ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": 10}] * 12, "The column 'text' holds int64, not text"),
        ([{"text": [1.5]}] * 12, "The column 'text' holds float64, not text"),
        ([{"text": {"en": "a cat"}}] * 12, "The column 'text' holds dict, not text"),
        ([{"text": None}] * 12, "rows can be used; the first: there is no caption."),
        ([{"text": "a"}, {"text": 1}] * 6, ""),
        (
            [{"text": "a", "file_name": "/elsewhere/0.png"}] * 12,
            "/elsewhere/0.png",
        ),
        ([], ""),
    ],
    ids=["numbers", "lists-of-numbers", "dicts", "none", "mixed", "absolute", "empty"],
)
def test_metadata_that_teaches_nothing(rows, message, tiny_repo, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, image in enumerate(tiny.images(12)):
        image.save(folder / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", **row}) + "\n" for number, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    error = error_of(capsys, CAPTION, tmp_path / "out", dataset=folder, model=tiny_repo, eval_size=4)
    assert message in error
    assert "column" in error or "can be used" in error or str(folder) in error


# ---- paths and packages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "name", "value"),
    [
        (CAPTION, "dataset", "tests/nowhere"),
        (CAPTION, "eval_dataset", "./nowhere"),
        (CAPTION, "model", "tests/nowhere"),
        (CAPTION, "caption_head", "/nowhere"),
        (AUTOENCODE, "encoder", "nowhere"),
        (AUTOENCODE, "decoder", "some/where/else"),
        ("tiny/teacher", "vae", "nowhere"),
    ],
)
def test_the_hub_is_not_asked_for_a_missing_path(
    recipe, name, value, scenes, tiny_repo, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.dataset_info", lambda *a, **k: pytest.fail("asks the Hub"))
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", lambda *a, **k: pytest.fail("asks it"))
    settings = {"dataset": scenes, "model": tiny_repo if recipe == CAPTION else None}
    settings |= {"encoder": tiny_repo, "decoder": tiny_repo} if recipe == AUTOENCODE else {}
    error = error_of(capsys, recipe, tmp_path, **{**settings, name: value})
    assert error.startswith(f"There is no folder {value}, which {name} names; it must be ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "lomo"}, "The optimizer lomo needs a package that is not installed"),
        ({"report_to": "codecarbon"}, "report_to: CodeCarbonCallback requires"),
        ({"lora_rank": 2}, "peft"),
    ],
)
def test_a_package_that_is_not_installed(settings, message, common, tmp_path, capsys, monkeypatch):
    for name in ("lomo_optim", "codecarbon", "peft"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    assert message in error_of(capsys, CAPTION, tmp_path, **common, **settings)


def test_a_metric_that_evaluations_do_not_measure(common, tmp_path, capsys):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    error = error_of(capsys, CAPTION, tmp_path, metric_for_best_model="exact_captions", **common, **settings)
    assert error.startswith("metric_for_best_model is exact_captions")


# ---- output folders -----------------------------------------------------------------------------------------------


def test_an_output_folder_that_is_a_file(common, tmp_path, capsys):
    (tmp_path / "out").write_text("notes")
    assert error_of(capsys, CAPTION, tmp_path / "out", **common).endswith("is a file: name a folder.")
    assert (tmp_path / "out").read_text() == "notes"


def test_two_runs_into_one_folder(common, tmp_path, capsys):
    with locked(tmp_path):
        assert error_of(capsys, CAPTION, tmp_path, **common).startswith(f"Another run is writing to {tmp_path}")


@pytest.mark.slow
def test_checkpoints_of_an_earlier_run_are_resumed_or_refused(common, tmp_path, capsys):
    settings = {"max_steps": 2, **common}
    first = run(CAPTION, tmp_path, **settings)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert f"{tmp_path} holds checkpoint-2 of an earlier run" in error_of(capsys, CAPTION, tmp_path, **settings)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    again = run(CAPTION, tmp_path, resume=True, **settings)
    assert "checkpoint-2 already has all 2 steps." in capsys.readouterr().out
    assert again["steps"] == 2 and losses(again) == losses(first)
    assert again["seconds"] == first["seconds"] > 0
    assert (tmp_path / "model.safetensors").read_bytes() == before[tmp_path / "model.safetensors"]
    assert not (tmp_path / "checkpoint-3").exists()

    error = error_of(capsys, CAPTION, tmp_path, resume=True, **{**settings, "max_steps": 1})
    assert error == f"{tmp_path / 'checkpoint-2'} has more steps than max_steps=1: give a larger max_steps."
    error = error_of(capsys, CAPTION, tmp_path, resume=True, optim="sgd", **{**settings, "max_steps": 3})
    assert error.startswith(f"{tmp_path / 'checkpoint-2'} was saved with another optimizer")


@pytest.mark.slow
def test_resume_with_nothing_to_resume_says_so(common, tmp_path, capsys):
    assert run(CAPTION, tmp_path, resume=True, max_steps=1, **common)["resumed_from"] is None
    assert f"There is no whole training checkpoint in {tmp_path}" in capsys.readouterr().out


# ---- losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logging_steps": 1, "save_strategy": "no"}, "The loss is nan at step 2"),
        ({"logging_steps": 9, "save_steps": 1}, "Weights are not finite at step 2"),
    ],
    ids=["log", "checkpoint"],
)
@pytest.mark.slow
def test_a_loss_that_is_not_a_number_ends_the_run(settings, message, common, tmp_path, capsys):
    settings = {"learning_rate": 1e30, "warmup_steps": 0, "lr_scheduler_type": "constant", **common, **settings}
    assert message in error_of(capsys, CAPTION, tmp_path, **settings)
    assert not (tmp_path / "model.safetensors").exists()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        assert all(weight.isfinite().all() for weight in load_file(checkpoint / "model.safetensors").values())


def smoothed_by_hand(logits, labels, factor):
    """The mean cross-entropy over all labels, with (1 - factor) on the token and factor spread over all tokens."""
    sums = []
    for row, wanted in zip(logits, labels, strict=True):
        for scores, token in zip(row, wanted.tolist(), strict=False):  # there is one more position than labels
            if token != -100:
                logs = scores.double() - scores.double().exp().sum().log()
                target = torch.full_like(logs, factor / len(logs))
                target[token] += 1 - factor
                sums.append(-(target * logs).sum().item())
    return sum(sums) / len(sums)


@pytest.mark.slow
def test_label_smoothing_of_stage_2(common, tmp_path):
    """One step takes all rows, in four batches with different numbers of tokens. Learning rate 0 changes no weight."""
    settings = {"label_smoothing_factor": 0.2, "learning_rate": 0, "max_steps": 1, "save_strategy": "no", **common}
    settings |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    record = run(CAPTION, tmp_path / "out", **settings)
    stage_type, own, args = read_recipe(arguments(CAPTION, tmp_path / "stage", **settings))
    stage = stage_type(own, args)
    stage.prepare()
    for name, data in (("loss", stage.train_dataset), ("eval_loss", stage.eval_dataset)):
        inputs = stage.collate(data[:])
        with torch.no_grad():
            logits = stage.model.eval()(**inputs).logits
        found = next(row[name] for row in record["log"] if name in row)
        assert found == pytest.approx(smoothed_by_hand(logits, inputs["labels"], 0.2), rel=1e-4), name


def test_label_smoothing_is_refused_without_labels(common, tmp_path, capsys):
    error = error_of(capsys, AUTOENCODE, tmp_path, label_smoothing_factor=0.1, **common)
    assert error.startswith("label_smoothing_factor is 0.1, but the loss of stage 'autoencode' has no labels")
    error = error_of(capsys, CAPTION, tmp_path, label_smoothing_factor=1, **common)
    assert error == "label_smoothing_factor is 1: it must be at least 0 and less than 1."


@pytest.mark.slow
def test_label_smoothing_of_the_language_stage(scenes, tmp_path):
    settings = {"dataset": scenes, "max_steps": 1, "save_strategy": "no", "learning_rate": 0}
    plain, smooth = (
        run(LANGUAGE, tmp_path / str(factor), label_smoothing_factor=factor, **settings) for factor in (0, 0.3)
    )
    assert smooth["evaluation"]["eval_loss"] != pytest.approx(plain["evaluation"]["eval_loss"], rel=1e-4)


@pytest.mark.slow
def test_the_best_checkpoint_is_saved(common, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    settings |= {"learning_rate": 3, "lr_scheduler_type": "constant", "warmup_steps": 0, "save_dtype": "float32"}
    record = run(CAPTION, tmp_path, **settings, **common)
    found = {row["step"]: row["eval_loss"] for row in reversed(record["log"]) if "eval_loss" in row}
    best = min(found, key=found.get)
    assert best < 4  # such steps make it worse
    assert record["evaluation"]["eval_loss"] == pytest.approx(found[best], rel=1e-5)
    whole = load_file(tmp_path / "model.safetensors")
    for name, weight in load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors").items():
        torch.testing.assert_close(whole[name], weight)

    moved = tmp_path.rename(tmp_path.with_name("moved"))
    again = run(CAPTION, moved, resume=True, **settings, **common)
    assert again["evaluation"]["eval_loss"] == pytest.approx(found[best], rel=1e-5)
    for name, weight in load_file(moved / "model.safetensors").items():
        assert torch.equal(weight, whole[name]), name


# ---- images that cannot be read, when no image is read before training --------------------------------------------


@pytest.mark.slow
def test_images_that_cannot_be_read_are_left_out_while_training(tiny_repo, tmp_path, capsys):
    folder = write_scenes(tmp_path / "scenes", 12, split="train")
    broken = sorted(path.name for path in folder.glob("*.png"))[::2]
    for name in broken:
        (folder / name).write_bytes(b"no picture")
    settings = {"dataset": folder, "model": tiny_repo, "per_device_train_batch_size": 1, "eval_size": 2}
    record = run(CAPTION, tmp_path / "out", cache_features=False, max_steps=10, **settings)
    assert record["steps"] == 10
    lines = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["file_name"] for line in lines) == broken
    assert "6 unusable rows were left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings", [{}, {"cache_features": True}, {"streaming": True}], ids=["map", "cache", "stream"]
)
def test_no_image_can_be_read(settings, scenes, tiny_repo, tmp_path, capsys):
    folder = write_scenes(tmp_path / "scenes", 8, split="train")
    for path in folder.glob("*.png"):
        path.write_bytes(b"no picture")
    settings = {"dataset": folder, "model": tiny_repo, "eval_dataset": scenes, "max_steps": 1, **settings}
    error = error_of(capsys, CAPTION, tmp_path / "out", **settings)
    assert error.startswith("None of the ")
    assert not (tmp_path / "out" / "model.safetensors").exists()


# ---- caches -------------------------------------------------------------------------------------------------------


def needing(sizes, free, there=()):
    """The cost of caches of these sizes. The caches of the settings in `there` are already on the disk."""
    return lambda names: Cost(0 if set(names) == set(there) else sum(sizes[name] for name in names), free)


@pytest.mark.parametrize(
    ("switches", "seen", "free", "there", "on"),
    [
        (("auto", "auto"), 3, 1000, (), "both"),
        (("auto", "auto"), 1, 1000, (), ""),
        (("auto", "auto"), 3, 100, (), "latents"),  # the features would take more than half
        (("auto", "auto"), 3, 10, (), ""),
        (("auto", "auto"), 0.5, 10, ("latents", "features"), "both"),
        (("auto", "auto"), 0.5, 10, ("latents",), "latents"),
        ((True, "auto"), 1, 10, (), "latents"),
        ((True, "auto"), 3, 1000, (), "both"),
        (("auto", False), 3, 100, (), "latents"),
        ((False, "auto"), 3, 100, (), ""),
        ((True, True), 0.5, 0, (), "both"),  # the user decides; a disk that is too small is an error later
    ],
)
def test_auto_caches_are_on_if_they_fit_and_save_time(switches, seen, free, there, on):
    cost = needing({"latents": 10, "features": 60}, free, there)
    chosen = choose(dict(zip(("latents", "features"), switches, strict=True)), seen, cost)
    expected = {"both": {"latents", "features"}, "": set()}.get(on, {on})
    assert {name for name, (is_on, _) in chosen.items() if is_on} == expected
    for switch, (_, reason) in zip(switches, chosen.values(), strict=True):
        assert bool(reason) == (switch == "auto")


@pytest.mark.slow
def test_a_run_says_which_caches_it_makes_and_why(common, tmp_path, capsys, monkeypatch):
    def told(output_dir, **settings):
        run(AUTOENCODE, tmp_path / output_dir, save_strategy="no", **settings, **common)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cache_")]
        files = list((tmp_path / output_dir / "cache").glob("*/*.arrow"))
        return dict(line.split(": ", 1) for line in lines), len(files)

    reasons, files = told("once", max_steps=1)
    assert reasons == dict.fromkeys(
        ("cache_latents", "cache_features"),
        "off, because each image is used 0.12 times, and a cache pays from the second time on.",
    )
    assert files == 1  # that of the evaluation images, which are used several times

    reasons, files = told("often", max_steps=20)
    assert all(reason.startswith("on, because it takes ") for reason in reasons.values()) and files == 2
    assert all(reason.endswith("each image is used 2.5 times.") for reason in reasons.values())

    reasons, _ = told("often", max_steps=1)
    assert set(reasons.values()) == {"on, because it is on the disk already."}

    monkeypatch.setattr("vlv.training.vlv_stage.free_bytes", lambda folder: 1000)
    reasons, _ = told("full", max_steps=20)
    assert all("would take" in reason and reason.startswith("off") for reason in reasons.values())

    reasons, _ = told("trains", max_steps=20, train_parts=["vision_tower"], cache_latents=False)
    assert reasons == {"cache_features": "off, because the parts that would compute it train."}


def test_a_wrong_value_of_a_cache_setting(common, tmp_path, capsys):
    error = error_of(capsys, CAPTION, tmp_path, cache_features="maybe", **common)
    assert error == "cache_features is 'maybe': give auto, true or false."
