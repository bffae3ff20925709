"""Stage 2 with prompts: pairs, every way to read them, resuming, and what is left out or refused."""

import json

import pytest
import tiny
from running_train import arguments, losses, run

from processing_vlv import VLVProcessor
from vlv.cli import main as vlv
from vlv.data.rows import pairs_of
from vlv.scenes import write_scenes
from vlv.training.recipe import read_recipe

CAPTION = "tiny/caption"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes with many prompts each, and styles.json."""
    return write_scenes(tmp_path_factory.mktemp("prompts"), 24, split="train", prompts=True)


def make_dataset(folder, rows):
    """A folder of pictures whose metadata has these captions and prompts."""
    folder.mkdir()
    lines = []
    for number, (row, picture) in enumerate(zip(rows, tiny.images(len(rows)), strict=True)):
        picture.save(folder / f"{number:02}.png")
        lines.append(json.dumps({"file_name": f"{number:02}.png", **row}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def make_stage(output_dir, **settings):
    stage_type, settings, args = read_recipe(arguments(CAPTION, output_dir, model="vlv-tiny", **settings))
    stage = stage_type(settings, args)
    stage.prepare()
    return stage


@pytest.mark.parametrize(
    "captions, prompts, expected",
    [
        ("a", None, [("a", "")]),
        ("a", "p ", [("a", "p")]),
        (["a", "b"], None, [("a", ""), ("b", "")]),
        (["a", "b"], "p", [("a", "p"), ("b", "p")]),
        (["a", "b"], ["p", None], [("a", "p"), ("b", "")]),
        (["a", "", "c"], ["p", "q", ""], [("a", "p"), ("c", "")]),
        ("a", ["p", "q"], [("a", "p"), ("a", "q")]),
        ("a", [], [("a", "")]),
        (None, "p", []),
    ],
)
def test_captions_and_their_prompts(captions, prompts, expected):
    assert pairs_of(captions, prompts) == expected


def test_wrong_pairs():
    with pytest.raises(ValueError, match="there are 2 captions, but 3 prompts"):
        pairs_of(["a", "b"], ["p", "q", "r"])
    with pytest.raises(ValueError, match="The prompt 1 is not text"):
        pairs_of("a", 1)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_batches_hold_each_caption_behind_its_prompt(streaming, folder, tmp_path):
    stage = make_stage(tmp_path / "run", dataset=str(folder), streaming=streaming)
    known = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    known = {(caption, prompt) for row in known for caption, prompt in zip(row["text"], row["prompt"], strict=True)}
    rows = iter(stage.train_dataset)
    samples = [next(rows) for _ in range(12)]
    batch = stage.collate(samples)
    read = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        caption = stage.processor.decode(labels[labels != -100])
        before = ids[: int(labels.ne(-100).float().argmax())]
        read.append((caption, stage.processor.tokenizer.decode(before).removesuffix("\n")))
    assert set(read) <= known and len({prompt for _, prompt in read}) > 2


@pytest.mark.slow
def test_a_dataset_without_prompts_trains_as_before(folder, tmp_path):
    """The same captions in the same order give the same losses, with an empty column of prompts or without one."""
    rows = [{"text": f"a picture {number}"} for number in range(16)]
    plain = run(CAPTION, tmp_path / "a", dataset=str(make_dataset(tmp_path / "plain", rows)), model="vlv-tiny")
    assert not VLVProcessor.from_pretrained(tmp_path / "a").takes_prompts
    asked = make_dataset(tmp_path / "asked", [{**row, "prompt": ""} for row in rows])
    assert losses(run(CAPTION, tmp_path / "b", dataset=str(asked), model="vlv-tiny")) == losses(plain)


@pytest.mark.slow
def test_a_run_keeps_prompts_and_styles_and_resumes(folder, tmp_path):
    settings = {"dataset": str(folder), "model": "vlv-tiny", "styles": str(folder / "styles.json")}
    grouped = {"train_sampling_strategy": "group_by_length", "lora_rank": 4, "merge_lora": True}
    grouped |= {"lr_scheduler_type": "constant", "warmup_steps": 0}
    whole = run(CAPTION, tmp_path / "whole", **settings, **grouped)
    run(CAPTION, tmp_path / "parts", **settings, **grouped, max_steps=2)
    resumed = run(CAPTION, tmp_path / "parts", **settings, **grouped, resume=True)
    assert losses(resumed)[3] == losses(whole)[3]
    processor = VLVProcessor.from_pretrained(tmp_path / "whole")
    assert processor.takes_prompts and processor.styles == json.loads((folder / "styles.json").read_text())
    assert 0 <= whole["evaluation"]["exact_captions"] <= 1


def test_rows_that_cannot_be_used_are_left_out(tmp_path):
    rows = [{"text": ["a"], "prompt": ["why?"]} for _ in range(14)]
    rows += [{"text": ["a", "b"], "prompt": ["p", "q", "r"]}, {"text": ["a"], "prompt": ["long " * 300]}]
    folder = make_dataset(tmp_path / "rows", rows)
    run(CAPTION, tmp_path / "run", dataset=str(folder), model="vlv-tiny", eval_size=4, max_steps=6)
    reasons = {
        row["row"]: row["error"]
        for row in map(json.loads, (tmp_path / "run" / "failures.jsonl").read_text().splitlines())
    }
    assert "there are 2 captions, but 3 prompts" in reasons[14]
    assert "Shorten the prompt" in reasons[15]


@pytest.mark.parametrize(
    "column, styles, sentence",
    [
        ({"prompt": 1}, None, "The column 'prompt' holds int64, not text"),
        ({}, '{"short": "Be brief."}', "The dataset has no column 'prompt'"),
        ({"prompt": "p"}, '["short"]', "holds a list: it must be a mapping of names to prompts"),
        ({"prompt": "p"}, '{"short": 1}', "gives the style 'short' the prompt 1: both must be texts"),
        ({"prompt": "p"}, "{: ]", "is neither JSON nor YAML"),
    ],
)
def test_what_is_refused(column, styles, sentence, tmp_path, capsys):
    folder = make_dataset(tmp_path / "rows", [{"text": "a", **column} for _ in range(16)])
    settings = {"dataset": str(folder), "model": "vlv-tiny"}
    if styles is not None:
        (tmp_path / "styles.json").write_text(styles)
        settings["styles"] = str(tmp_path / "styles.json")
    assert vlv(["train", *arguments(CAPTION, tmp_path / "run", **settings)]) != 0
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in error
