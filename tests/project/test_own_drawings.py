"""The experiment that fine-tunes a bundled model on a user's own drawings."""

import json

import pytest

import vlv
from experiments import doodles
from experiments.making import Scenes, Training
from experiments.report import DOCS, table
from vlv.scenes.doodles import Doodle


def test_scores_of_captions_in_any_grammar():
    shown = [Doodle((("red", "kite"), ("blue", "fir tree"))), Doodle((("green", "cup"),))]
    captions = [
        "a small kite at the top left and a blue fir tree on a mint background",
        "a crayon drawing of a green cup",
    ]
    scores = doodles.scores(captions, shown)
    assert {name: (score.value, score.n) for name, score in scores.items()} == {
        "captions exact": (0.5, 2),
        "names right": (1.0, 3),
        "colour and name right": (pytest.approx(2 / 3), 3),
    }


def test_a_name_inside_a_longer_word_is_not_the_name():
    doodle = Doodle((("red", "star"), ("red", "sun")))
    score = doodles.scores(["two stars and a sunflower"], [doodle])["names right"]
    assert score.value == 0


@pytest.mark.slow
def test_the_experiment_runs(tmp_path, monkeypatch, capsys):
    settings = {"dataset": Scenes(8, "train", "doodles"), "eval_size": 2, "max_steps": 2, "warmup_steps": 0}
    run = {"model": "vlv-tiny", "per_device_train_batch_size": 2}
    monkeypatch.setattr(doodles, "fine_tuned", lambda recipe, *_: Training(recipe, settings | run))
    for name, value in {"HELD_OUT": 3, "COUNTS": (8,), "SEEDS": (0,)}.items():
        monkeypatch.setattr(doodles, name, value)
    output = tmp_path / "doodles.json"
    doodles.main(["--model", "vlv-tiny", "--work", str(tmp_path / "work"), "--output", str(output)])
    record = json.loads(output.read_text())
    assert [run["drawings"] for run in record["runs"]] == [0, 8, 8]
    assert record["runs"][0]["scores"]["captions exact"]["value"] == 0  # another grammar
    assert "| finetune-all | 8 | 1 |" in capsys.readouterr().out


def test_the_page_shows_what_was_measured():
    record = json.loads((DOCS / "results" / "doodles.json").read_text(encoding="utf-8"))
    assert record["model"] == vlv.BUNDLED
    assert table(doodles.rows(record)) in (DOCS / "own-drawings.md").read_text(encoding="utf-8")
