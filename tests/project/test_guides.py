"""Runs the code of the guides and of the notebook.

The `sh` and `python` blocks of a page run in their order, each in a new process. All blocks of a page run in one
folder, which is empty at the start, with the package installed from its wheel. Blocks that need a download, a GPU or
hours are marked as `text`, or indented.
"""

import json
import re

import nbformat
import pytest
from nbclient import NotebookClient
from paths import ROOT

NOTEBOOK = ROOT / "notebooks" / "zero_to_captioner.ipynb"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUN = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": ["python", "-c"]}
PAGES = [
    "README",
    *(
        f"docs/{name}"
        for name in (
            "training",
            "captioning",
            "evaluation",
            "publish",
            "convert",
            "extending",
            "teachers",
            "serving",
            "prompts",
            "own-drawings",
        )
    ),
]


@pytest.fixture
def follow(installed, tmp_path):
    """Runs the blocks of a page in `tmp_path` and returns their output. `changes` replaces parts of the page."""

    def follow(page, changes=()):
        text = (ROOT / f"{page}.md").read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        blocks = [(kind, block) for kind, block in BLOCK.findall(text) if kind in RUN]
        assert blocks, f"{page}.md has no block that can be run"
        return "".join(installed(*RUN[kind], block, cwd=tmp_path) for kind, block in blocks)

    return follow


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_training(follow, tmp_path):
    follow("docs/training")
    captions = [row["text"] for row in rows(tmp_path / "captions.jsonl")]
    assert len(captions) == 200
    assert sum(caption.startswith("view: a ") for caption in captions) > 150
    record = json.loads((tmp_path / "my_captioner" / "training.json").read_text())
    assert record["steps"] == 90 and record["resumed_from"] == "checkpoint-80"
    assert "| view: a " in (tmp_path / "my_captioner" / "samples" / "step-80.md").read_text()


@pytest.mark.slow
def test_captioning(follow, tmp_path):
    by_message, begun, alone, found = follow("docs/captioning").splitlines()[-4:]
    assert found.startswith("0000") and (tmp_path / "found.png").is_file()
    (first, _) = rows(tmp_path / "scenes" / "metadata.jsonl")
    assert first["text"] in by_message and first["text"] in alone
    assert "'role': 'assistant', 'content': [{'type': 'text', 'text': 'a large " in begun


@pytest.mark.slow
def test_prompts(follow, tmp_path):
    printed = follow("docs/prompts")
    for row in rows(tmp_path / "scenes" / "metadata.jsonl"):
        things, _, ground = row["text"].partition(" on a ")
        tags = dict.fromkeys([re.sub(r"^a | at the .*", "", thing) for thing in things.split(" and a ")])
        assert f"{row['file_name']}\t{', '.join(tags)}, {ground}\n" in printed
        assert f"{row['file_name']}\t{ground.removesuffix(' background')}\n" in printed
    plain, titles = ([row["text"] for row in rows(tmp_path / f"{name}.jsonl")] for name in ("plain", "titles"))
    assert sum(text.startswith("title: a ") for text in titles) > 180
    assert sum(text.startswith("a ") for text in plain) > 180


@pytest.mark.slow
def test_own_drawings(follow, tmp_path):
    shorter = [("train finetune-all", "train finetune-all --max_steps 100"), ("step-600", "step-100")]
    follow("docs/own-drawings", shorter)  # enough for the wording, not for the drawings
    before, after = (rows(tmp_path / f"{when}.jsonl") for when in ("before", "after"))
    assert not any(row["text"].startswith("a crayon drawing of") for row in before)
    assert all(row["text"].startswith("a crayon drawing of") for row in after)


@pytest.mark.slow
def test_readme(follow, tmp_path):
    follow("README")
    assert len(rows(tmp_path / "captions.jsonl")) == 12
    assert (tmp_path / "rebuilt.png").is_file() and (tmp_path / "rebuilt" / "contact_sheet.png").is_file()
    assert (tmp_path / "stage2" / "final" / "config.json").is_file()


@pytest.mark.slow
def test_evaluation(follow, tmp_path):
    assert "'bleu_1': " in follow("docs/evaluation")


@pytest.mark.slow
def test_extending(follow, tmp_path):
    printed = follow("docs/extending")
    assert (tmp_path / "captions.csv").read_text().startswith("file_name,text\n")
    assert json.loads((tmp_path / "shouting" / "training.json").read_text())["steps"] == 2
    assert "colours" in printed


@pytest.mark.slow
def test_notebook(tmp_path):
    """It runs in an empty folder, and the captioner that it trains has learned the new wording."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "view: a " in printed
    assert (tmp_path / "my_captioner" / "config.json").is_file()


@pytest.mark.slow
def test_teachers(follow, tmp_path):
    follow("docs/teachers")
    rebuilt, changed = ((tmp_path / f"{name}.png").read_bytes() for name in ("rebuilt", "with_lora"))
    assert rebuilt != changed and (tmp_path / "with_words" / "contact_sheet.png").is_file()


@pytest.mark.slow
def test_convert(follow, tmp_path):
    """ONNX Runtime and the exported caption head describe the scene as it is."""
    *_, caption = follow("docs/convert").splitlines()
    (first, _) = rows(tmp_path / "scenes" / "metadata.jsonl")
    assert caption == first["text"]


def test_notebook_is_committed_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_are_python(page):
    for kind, text in BLOCK.findall((ROOT / f"{page}.md").read_text()):
        if kind == "python":
            compile(text, f"{page}.md", "exec")


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page):
    file = ROOT / f"{page}.md"
    for link in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", file.read_text()):
        assert (file.parent / link).exists(), f"{page}.md links to {link}"
