"""The arithmetic of the experiments, and that docs/results.md shows the contents of their JSON."""

import dataclasses
import json
import shutil
from importlib import import_module

import numpy as np
import pytest
import tiny
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Florence2ForConditionalGeneration

from experiments import MEASURED, emoji, making, report
from experiments.__main__ import main, write
from experiments.composition import join
from experiments.making import ENCODER, Assembled, Bundled, Checkpoint, Scenes, Training, claimed, once
from experiments.peers import load_florence, load_llava
from experiments.sampling import reader_features
from experiments.spatial import cell_centre, centre
from experiments.trained import Plan, Run
from modeling_vlv import VLVForConditionalGeneration, VLVModel
from processing_vlv import VLVProcessor
from vlv import bundled_checkpoint
from vlv.evaluation.metrics.frechet import frechet_distance
from vlv.scenes import WORLD, Scene, SceneObject, sample_picture
from vlv.training.trainer import StageTrainer


@pytest.mark.parametrize("place, cell", list(zip(WORLD.places, ((0, 0), (16, 0), (0, 16), (16, 16)), strict=True)))
def test_the_centre_of_an_object_is_its_centre_of_mass(place, cell):
    item = SceneObject("small", "red", "square", place)
    scene = Scene((item,), "mint")
    picture = Image.new("RGB", (32, 32), WORLD.backgrounds["mint"])
    left, top = cell[0] + 3, cell[1] + 5
    picture.paste(WORLD.colours["red"], (left, top, left + 6, top + 4))
    np.testing.assert_allclose(centre(picture, scene, item), (left + 3, top + 2))
    np.testing.assert_allclose(cell_centre(item), (cell[0] + 8, cell[1] + 8))


def test_joined_embeddings_are_the_first_ones_of_one_and_then_the_others():
    first, second = torch.arange(5.0)[None, :, None], 10 + torch.arange(5.0)[None, :, None]
    assert join(first, second, 2, "from its start").flatten().tolist() == [0, 1, 10, 11, 12]
    assert join(first, second, 2, "in its place").flatten().tolist() == [0, 1, 12, 13, 14]
    for how in ("from its start", "in its place"):
        assert torch.equal(join(first, second, 0, how), second)
        assert torch.equal(join(first, second, 5, how), first)


def test_a_table_shows_settings_and_measurements():
    rows = [{"steps": 20, "share": {"value": 0.51, "n": 10, "standard_error": 0.02}, "FID": 1.23456}]
    assert report.table(rows).splitlines() == [
        "| steps | share | FID |",
        "| --- | --- | --- |",
        "| 20 | 0.510 ± 0.020 | 1.235 |",
    ]
    assert report.fill("a\n<!-- x -->\nold\n<!-- /x -->\nb", "x", "new\n") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb"
    with pytest.raises(ValueError, match="no place for y"):
        report.fill("text", "y", "new")


@pytest.mark.parametrize("name", MEASURED)
def test_the_page_shows_what_was_measured(name):
    page = (report.DOCS / "results.md").read_text(encoding="utf-8")
    rows = json.loads((report.DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    assert report.table(rows) in page
    figure = Figure()
    import_module(f"experiments.{name}").plot(rows, figure)
    assert all(axes.lines for axes in figure.axes)


def test_the_distance_of_a_set_from_itself_is_zero():
    images, others = (
        reader_features([sample_picture("test", index)[0] for index in range(first, first + 20)]) for first in (0, 20)
    )
    assert 0 <= frechet_distance(images, images) < 1e-6
    assert frechet_distance(images, others) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_an_experiment_can_be_run_again(name):
    from vlv.models.loading import load_whole

    model, processor = load_whole("vlv-tiny")
    rows = import_module(f"experiments.{name}").run(model.float().eval(), processor, 4)
    recorded = json.loads((report.DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    assert [row.keys() for row in rows] == [row.keys() for row in recorded]
    json.dumps(rows, allow_nan=False)


# ---- experiments that train --------------------------------------------------------------------------------

SMALL = Plan(
    stage1=2,
    stage2=2,
    heads=2,
    batch=4,
    images=12,
    captions=8,
    few_captions=(8,),
    few_images=(8,),
    language=1,
    cleaned=(10,),
    evaluation=4,
    save_steps=2,
    seeds=(0,),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder with `work` and `results` of a command with two runs, and the arguments of the command."""
    folder = tmp_path_factory.mktemp("experiments")
    argv = ["text_encoder", "--num", "2", "--work", str(folder / "work"), "--output", str(folder / "results")]
    main(argv, SMALL)
    return folder, argv


@pytest.mark.slow
def test_a_run_records_its_origin(trained):
    folder, _ = trained
    record = json.loads((folder / "results" / "text_encoder" / "bypassed-seed0.json").read_text())
    assert {"captions/test/exact", "reconstruction/test/objects_right"} <= record["scores"].keys()
    assert all(0 <= score["value"] <= 1 for score in record["scores"].values())
    assert (record["num"], record["seed"]) == (2, 0)
    assert record["commit"]
    assert record["versions"].keys() == {"vlv", "torch", "transformers", "diffusers"}
    stages = {training["recipe"]["stage"]: training for training in record["trainings"]}
    assert list(stages) == ["autoencode", "language", "caption"]
    for training in stages.values():
        assert training["steps"] == training["recipe"]["max_steps"]
        assert training["commit"] and training["versions"] and "log" not in training
    assert stages["caption"]["recipe"]["dataset"].endswith("scenes-train-8")
    assert stages["caption"]["recipe"]["train_parts"] == ["prefix_projection", "caption_head"]
    model = VLVForConditionalGeneration.from_pretrained(stages["caption"]["recipe"]["output_dir"])
    assert model.config.bypass_text_encoder
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_finished_work_is_not_repeated(trained, monkeypatch):
    def fail(*args):
        raise AssertionError("made again")

    folder, argv = trained
    before = {file: file.read_text() for file in folder.glob("results/**/*.json")}
    assert len(before) == 2
    with monkeypatch.context() as patch:
        patch.setattr("experiments.trained.Run.make", fail)
        main(argv, SMALL)
    (folder / "results" / "base" / "seed0.json").unlink()
    monkeypatch.setattr("vlv.commands.train.main", fail)
    main(argv, SMALL)  # measures the trained models again
    after = {file: file.read_text() for file in folder.glob("results/**/*.json")}
    assert after.keys() == before.keys()
    for file, text in before.items():
        assert json.loads(after[file])["scores"] == json.loads(text)["scores"]


def test_a_changed_recipe_is_another_training(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    folders = []
    for rate in (1, 2, 1):
        recipe.write_text(f"stage: language\nlearning_rate: {rate}\n")
        whole = Training("tiny/caption", {"model": Training(str(recipe), {})})
        folders.append((Training(str(recipe), {}).folder(tmp_path), whole.folder(tmp_path)))
    assert folders[0] == folders[2]
    assert not set(folders[0]) & set(folders[1])


def test_a_process_skips_the_work_of_another_process(tmp_path):
    with claimed(tmp_path / "work" / "one"):
        assert not write(tmp_path / "one.json", tmp_path / "work" / "one", lambda: {"made": True})
        with pytest.raises(BlockingIOError):
            once(tmp_path / "work" / "one", "last", lambda: None)
    assert write(tmp_path / "one.json", tmp_path / "work" / "one", lambda: {"made": True})
    assert json.loads((tmp_path / "one.json").read_text()) == {"made": True}


@pytest.mark.slow
def test_an_interrupted_run_continues(trained, monkeypatch):
    """The run is killed at the third of four steps. It resumes from the checkpoint of the second step."""
    folder, _ = trained
    plan = dataclasses.replace(SMALL, stage1=4, evaluation=3)
    training = plan.autoencode(plan.start(0))
    step, steps = StageTrainer.training_step, []

    def killed(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        training.make(folder / "work")
    made = training.make(folder / "work")
    record = json.loads((made / "training.json").read_text())
    assert (record["resumed_from"], record["steps"]) == ("checkpoint-2", 4)
    assert steps == [0, 1, 2, 2, 3]


@pytest.mark.slow
def test_llava_is_made_of_the_same_parts(trained):
    """It reads VLV's own image tokens, and writes the tokens that its language model finds likeliest after them."""
    folder, _ = trained
    made = SMALL.llava(8, 0).make(folder / "work")
    peer = load_llava(made)
    vlv = VLVModel.from_pretrained(SMALL.start(0).make(folder / "work"))
    image, _ = sample_picture("test", 0)
    pixel_values = VLVProcessor.from_pretrained(SMALL.start(0).make(folder / "work"))(images=image)["pixel_values"]
    with torch.inference_mode():
        tokens = vlv.get_image_features(pixel_values)
        tower = peer.model.model.vision_tower(pixel_values).last_hidden_state
        torch.testing.assert_close(tower, tokens, rtol=1e-4, atol=1e-4)
        states = peer.model.model.multi_modal_projector(tokens)
        ids = []
        for _ in range(5):
            logits = peer.model.lm_head(peer.model.model.language_model(inputs_embeds=states).last_hidden_state)
            ids.append(logits[0, -1].argmax())
            states = torch.cat([states, peer.model.get_input_embeddings()(ids[-1])[None, None]], dim=1)
    (caption,) = peer.write([image], max_new_tokens=5)
    assert caption.text == peer.tokenizer.decode(torch.stack(ids), skip_special_tokens=True)


def test_other_weights_are_another_training(tmp_path, monkeypatch):
    """What was trained from a checkpoint is not taken for what would be trained from its successor."""
    monkeypatch.setattr(making, "weights_of", making.weights_of.__wrapped__)  # without its cache

    def folders():
        head = Training("tiny/caption", {"model": Bundled("vlv-tiny")})
        tuned = Training("tiny/caption", {"model": Checkpoint("vlv-tiny")})
        teacher = Training("tiny/autoencode", {"model": Assembled(0)})
        return [one.folder(tmp_path).name for one in (head, tuned, teacher)]

    before = folders()
    assert folders() == before
    other = tmp_path / "other"
    shutil.copytree(bundled_checkpoint("vlv-tiny"), other)
    weights = load_file(other / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(making, "find_bundled", lambda name: str(other))
    assert not set(folders()) & set(before)


def test_scenes_of_other_settings_are_other_scenes(tmp_path):
    plain, more = Scenes(2).make(tmp_path), Scenes(2, settings={"max_objects": 4}).make(tmp_path)
    assert plain != more
    assert (plain / "metadata.jsonl").read_text() != (more / "metadata.jsonl").read_text()


@pytest.mark.slow
def test_florence_starts_from_the_pretrained_encoder(trained):
    folder, _ = trained
    run = Run("florence", SMALL.florence(8, 0))
    record = run.make(folder / "work", 2)
    assert "captions/test/exact" in record["scores"] and "reconstruction/test/exact" not in record["scores"]
    peer = load_florence(run.model.folder(folder / "work"))
    before = Florence2ForConditionalGeneration.from_pretrained(ENCODER.name, dtype=torch.float32)
    for name, weight in before.named_parameters():  # two steps of warm-up change it very little
        torch.testing.assert_close(dict(peer.model.named_parameters())[name], weight, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_the_bundled_stage_1_is_vlv_tiny_without_its_caption_head(trained):
    """Its encoder is vlv-tiny's, bit for bit. The parts that stage 2 trains are new."""
    folder, _ = trained
    whole = VLVModel.from_pretrained(bundled_checkpoint("vlv-tiny"), dtype=torch.float32)
    model, loading = VLVModel.from_pretrained(Bundled().make(folder / "work"), output_loading_info=True)
    assert not any(loading.values())
    assert model.caption_head is None and model.prefix_projection is None
    weights = whole.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_all_captioners_train_for_the_same_number_of_steps():
    """The numbers of steps and of captions per step are the same with and without stage 1, except for vlv-tiny's."""
    plan = Plan()
    runs = plan.runs()
    assert len({run.name for run in runs}) == len(runs)
    for row in plan.compare_captioners().rows:
        assert len(row.runs) == len(plan.seeds)
        for run in row.runs:
            steps, training = 0, run.model
            while isinstance(training, Training):
                steps += training.settings["max_steps"]
                assert training.settings["per_device_train_batch_size"] == plan.batch
                training = training.settings.get("model")
            assert steps == (plan.stage2 if isinstance(training, Bundled) else plan.stage1 + plan.stage2)
            assert run.model.settings["dataset"] == Scenes(row.settings["captions"])


@pytest.mark.slow
def test_the_report_of_unfinished_experiments(trained, tmp_path):
    """The text and the table say what is missing."""
    folder, _ = trained
    docs = tmp_path / "docs"
    shutil.copytree(folder / "results", docs / "results")
    for name in MEASURED:
        shutil.copy(report.DOCS / "results" / f"{name}.json", docs / "results")
    shutil.copy(report.DOCS / "results.md", docs)
    plan = dataclasses.replace(SMALL, seeds=(0, 1))
    report.main(docs, plan)
    page = (docs / "results.md").read_text()
    assert report.progress(plan, docs / "results") in page
    (experiment,) = [one for one in plan.experiments() if one.name == "text_encoder"]
    rows = report.gather(experiment, docs / "results")
    assert [row["seeds"] for row in rows] == ["1 of 2", "1 of 2"]
    assert report.table(rows) in page
    queries = report.gather(plan.compare_queries(), docs / "results")
    assert [row["seeds"] for row in queries] == ["0 of 2"] * 3 + ["1 of 2"]
    assert "| 1 | – | 0 of 2 | – | – | – |" in page


def test_spread_over_seeds():
    scores = [{"value": value, "n": 10, "standard_error": 0.1} for value in (0.25, 0.75, 0.5)]
    assert report.spread(scores) == {"value": 0.5, "lowest": 0.25, "highest": 0.75}
    assert report.spread([None, scores[0], None]) == scores[0]
    assert report.spread([None]) is None
    assert "0.500 (0.250 to 0.750)" in report.table([{"score": report.spread(scores)}])


def test_bypassed_text_encoder_leaves_the_embeddings_as_they_are():
    model = tiny.model(bypass_text_encoder=True)
    embeds = torch.randn(2, 10, model.config.text_encoder_config.hidden_size)
    assert torch.equal(model.encode_context(embeds), embeds)
    assert not torch.equal(tiny.model().encode_context(embeds), embeds)
    assert torch.equal(model.empty_context(), tiny.model().empty_context())


def test_the_page_shows_the_finished_trainings():
    page = (report.DOCS / "results.md").read_text(encoding="utf-8")
    assert report.progress(Plan(), report.DOCS / "results") in page, "run `make results`"
    for experiment in Plan().experiments():
        rows = report.gather(experiment, report.DOCS / "results")
        if any(row["parameters"] for row in rows):
            assert report.table(rows) in page, "run `make results`"


def test_the_page_of_vlv_emoji_shows_its_peers():
    (experiment,) = emoji.EmojiPlan().experiments()
    rows = report.gather(experiment, report.DOCS / "results", emoji.COLUMNS)
    assert all(row["parameters"] for row in rows)
    assert report.table(rows) in (report.DOCS / "vlv-emoji.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_peers_of_vlv_emoji_are_trained_and_measured(tmp_path):
    # Enough captions for the tokenizer to know every word.
    plan = emoji.EmojiPlan(captions=600, steps=2, language=2, batch=4, seeds=(0,))
    emoji.main(["--num", "2", "--work", str(tmp_path / "work")], plan, tmp_path / "results")
    rows = report.gather(plan.experiments()[0], tmp_path / "results", emoji.COLUMNS)
    assert [row["captioner"] for row in rows] == ["VLV", "Florence-2", "LLaVA"]
    assert all(0 <= row[column]["value"] <= 1 for row in rows for column in emoji.COLUMNS)
