"""The speed run, with a few steps on a few scenes."""

import json
import sys

import pytest
from paths import ROOT

from benchmarks import flops, speedrun
from benchmarks.speedrun import RUNS, Run
from vlv.training.recipe import read_recipe

FLOPS = ROOT / "benchmarks" / "results" / "flops.json"


@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_one_that_can_be_trained(name):
    run = RUNS[name]
    argv = [run.file, "--output_dir", "out"]
    for setting, value in run.settings.items():
        argv += [f"--{setting}", str(value)]
    stage, settings, args = read_recipe(argv)
    assert stage is speedrun.MeasuredStage
    if name not in ("paper", "ours"):  # it changes one thing of these, not the number of samples
        samples = run.steps * args.per_device_train_batch_size * settings.noise_draws
        steps = {RUNS["paper"].steps, RUNS["ours"].steps // 2, speedrun.LEVER_STEPS}
        assert samples in {32 * number for number in steps}


def test_steps_to_a_target_lie_between_two_measurements():
    measured = [(100, 0.5), (200, 0.8), (300, 1.0)]
    assert speedrun.steps_to(0.9, measured) == pytest.approx(250)
    assert speedrun.steps_to(0.25, measured) == pytest.approx(50)
    assert speedrun.steps_to(0.8, measured) == pytest.approx(200)
    assert speedrun.steps_to(0.9, measured[:2]) is None


@pytest.mark.slow
def test_a_run_leaves_its_curve_and_its_operations(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sizes = {
        "IMAGES": 64,
        "EVALUATION": 4,
        "FLORENCE_STEPS": 2,
        "MEASURED_SCENES": 3,
        "FINISHED_SCENES": 4,
        "TARGET": 0.0,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(speedrun, name, value)
    small = {"per_device_train_batch_size": 4, "warmup_steps": 0, "save_steps": 2}
    own = small | {"average_decay": 0.5, "noise_draws": 4, "nested_queries": True}
    runs = {
        "paper": Run("paper", 4, small, long=True),
        "ours": Run("ours", 4, own, {"num_queries": 8, "projection_start": "mean"}),
    }
    monkeypatch.setattr(speedrun, "RUNS", runs)
    output, picture = tmp_path / "speedrun.json", tmp_path / "curves.png"
    argv = ["speedrun", "--seeds", "0", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", [*argv, "--output", str(output), "--picture", str(picture)])
    speedrun.main()
    record = json.loads(output.read_text())
    paper, ours = record["speedrun"]
    assert [line["step"] for line in ours["curve"]] == [2, 4]
    # The finished model is the one whose weights the last point of the curve was measured with.
    assert ours["curve"][-1]["objects right"] == ours["objects_right"]["8"]
    assert list(ours["objects_right"]) == ["2", "4", "8"]
    (right,) = paper["objects_right"].values()
    assert right["n"] > paper["curve"][-1]["objects right"]["n"]
    # Captions of the scenes that are wrong: each has at least one wrong object. Those of short runs are not kept.
    assert len(paper["wrong"]) <= right["n"] - round(right["value"] * right["n"]) and "wrong" not in ours
    teacher = record["teacher"]
    assert teacher["objects_right"]["n"] == right["n"]
    assert bool(teacher["wrong"]) == (teacher["objects_right"]["value"] < 1)
    # At four noise levels an image costs more, but less than four times as much.
    for size in ("", "published_"):
        each, own = paper[f"{size}operations_of_a_sample"], ours[f"{size}operations_of_a_sample"]
        assert each / 4 < own < each
        assert ours[f"{size}operations_to_target"] == ours["steps_to_target"] * 4 * 4 * own
    row = next(way for way in json.loads(FLOPS.read_text())["operations"]["stage 1"] if way["way"] == "paper")
    assert paper["published_operations_of_a_sample"] == row["each"]
    assert picture.stat().st_size > 0
    before = output.read_bytes()
    monkeypatch.setattr(flops, "stage_1", None)  # a second command measures nothing again
    speedrun.main()
    assert output.read_bytes() == before
