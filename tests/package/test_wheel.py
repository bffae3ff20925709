"""The wheel: its contents, and everything that a user can do with it without a checkout."""

import json
import re
import subprocess
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from installed_wheel import tracked
from paths import ROOT

from vlv import bundled_checkpoint

pytestmark = pytest.mark.slow


def test_holds_code_checkpoint_and_data(wheel):
    assert wheel.stat().st_size < 70e6
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        published = {file.name for file in ROOT.glob("*_vlv.py")}
        assert published <= names
        # All files of the package in git, including recipes, examples and drawings.
        assert set(tracked("vlv", "vlv_app")) <= names
        # The checkpoint is complete. Its code files are copies of the published files, not links.
        for file in Path(bundled_checkpoint()).rglob("*"):
            if file.is_file():
                assert archive.read(file.relative_to(ROOT).as_posix()) == file.read_bytes()
        for name in published:
            assert archive.read(f"vlv/checkpoints/vlv-emoji/{name}") == (ROOT / name).read_bytes()


def test_demo_caption_reconstruct_and_evaluate(installed):
    assert "reconstructions.png" in installed("vlv", "demo", "--output", "demo")
    installed("vlv", "caption", "demo/scenes", "--output", "captions.jsonl")
    rows = [json.loads(line) for line in (installed.folder / "captions.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all(re.match("a (small|large) ", row["text"]) for row in rows)
    installed("vlv", "reconstruct", "demo/scenes", "--output", "rebuilt")
    assert (installed.folder / "rebuilt" / "contact_sheet.png").is_file()
    installed("vlv", "evaluate", "--num", "8", "--output", "results.json")
    metrics = json.loads((installed.folder / "results.json").read_text())["metrics"]
    assert metrics["captions/test/exact"]["n"] == 8


def test_training_by_the_name_of_a_recipe(installed):
    installed("vlv", "scenes", "--num", "60", "--split", "train", "--output", "scenes")
    settings = ["--max_steps", "2", "--eval_size", "8", "--per_device_train_batch_size", "4"]
    installed("vlv", "train", "finetune-caption", "--dataset", "scenes", "--output_dir", "trained", *settings)
    record = json.loads((installed.folder / "trained" / "training.json").read_text())
    assert record["steps"] == 2
    installed("vlv", "caption", "scenes/000000.png", "--model", "trained", "--output", "trained.jsonl")


def test_publish_builds_and_proves(installed):
    installed(
        "vlv", "publish", "vlv-tiny", "--repo-id", "ada/vlv", "--space", "ada/app", "--dry-run", "--output", "repo"
    )
    assert {"LICENSE", "README.md", "modeling_vlv.py"} <= {file.name for file in (installed.folder / "repo").iterdir()}
    assert (installed.folder / "repo-space" / "spaces_app.py").is_file()
    assert len(list((installed.folder / "repo-space" / "examples").glob("*.png"))) == 6


def test_app_serves_its_page_and_examples(installed):
    process = installed.start("vlv", "app", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        url = next(found[0] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        for _ in range(600):  # the address may be printed a moment before the server answers
            try:
                page = urllib.request.urlopen(url, timeout=60).read().decode()
                break
            except OSError:
                time.sleep(0.5)
        assert "vlv-emoji" in page and "data:image/png;base64," in page
    finally:
        process.terminate()
        process.wait()
