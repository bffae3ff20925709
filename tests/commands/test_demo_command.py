"""`vlv demo`, run as a process."""

import json
import subprocess
import sys

import pytest
from datasets import load_dataset
from PIL import Image

from vlv.cli import main
from vlv.scenes import parse_caption, split_of


def _run(*arguments, cwd):
    command = [sys.executable, "-m", "vlv", "demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=cwd)


@pytest.mark.slow
def test_demo_shows_file_caption_and_truth(tiny_repo, tmp_path):
    result = _run("--model", tiny_repo, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    shown = result.stderr.replace("\r", "\n").splitlines()
    progress = {"Drawing test scenes", "Captioning", "Rebuilding"}
    assert {line.split(":")[0] for line in shown if line.strip()} == progress  # and no library's warnings
    folder = tmp_path / "demo"
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    truths = [json.loads(line) for line in (folder / "scenes" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == len(truths) == 12
    assert [row["file_name"] for row in rows] == [f"scenes/{truth['file_name']}" for truth in truths]
    assert all((folder / row["file_name"]).is_file() for row in rows)
    assert all(split_of(parse_caption(truth["text"])) == "test" for truth in truths)
    table = " ".join(result.stdout.split())
    for truth in truths:
        assert f"✗ scenes/{truth['file_name']}" in table  # a random model is never right
        assert truth["text"].split(" at the ")[0] in table
    assert "0 of 12 captions are exactly right." in result.stdout
    with Image.open(folder / "reconstructions.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 800


@pytest.mark.slow
def test_demo_runs_again_over_its_own_output(tiny_repo, tmp_path):
    for seed in ("1", "2"):
        assert main(["demo", "--model", str(tiny_repo), "--output", str(tmp_path / "out"), "--seed", seed]) == 0
    rows = load_dataset("json", data_files=str(tmp_path / "out" / "captions.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert rows["train"].num_rows == 12


def test_demo_refuses_a_folder_of_other_files(tmp_path, capsys):
    (tmp_path / "captions.jsonl").write_text("mine")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "is not empty and was not written by this command" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["captions.jsonl"]
    assert (tmp_path / "captions.jsonl").read_text() == "mine"


@pytest.mark.slow
def test_demo_of_the_bundled_checkpoint_is_right(tmp_path):
    result = _run(cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    right = int(result.stdout.split(" of 12 captions are exactly right")[0].split()[-1])
    assert right >= 10  # eight are by artists that it knows, four by one that it never saw
    folder = tmp_path / "demo"
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    truths = [json.loads(line) for line in (folder / "scenes" / "metadata.jsonl").read_text().splitlines()]
    known = {row["file_name"]: row["text"] for row in rows if row["file_name"].startswith("scenes/")}
    assert known == {f"scenes/{truth['file_name']}": truth["text"] for truth in truths} and len(known) == 8
    assert result.stdout.count("✓") == right
