"""The wheel: what it holds, and every job of a user who has installed it and has no checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

from vlv import tiny_checkpoint

pytestmark = pytest.mark.slow


def _tracked(*folders):
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what git has: building leaves a folder behind, which would get into the next wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in _tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source]
    subprocess.run([sys.executable, *command], check=True)
    (path,) = folder.glob("vlv-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs the programs of an environment that has the wheel, in an empty folder, with the libraries of this one."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    bin = folder / "venv" / "bin"
    subprocess.run([bin / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    (site_packages,) = (folder / "venv" / "lib").glob("*/site-packages")
    # A folder that a .pth file names is searched, but the .pth files in it are not read: no editable vlv comes along.
    (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work = folder / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def start(program, *arguments, **options):
        command = [bin / program, *map(str, arguments)]
        return subprocess.Popen(command, cwd=work, env=environment | {"HF_HUB_OFFLINE": "1"}, text=True, **options)

    def run(program, *arguments):
        process = start(program, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate()
        assert process.returncode == 0, err
        return out

    run.start, run.work = start, work
    found = run("python", "-c", "import vlv, modeling_vlv; print(vlv.__file__); print(modeling_vlv.__file__)")
    assert all(str(site_packages) in line for line in found.splitlines())
    return run


def test_holds_code_checkpoint_and_data(wheel):
    assert wheel.stat().st_size < 60e6
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        published = {file.name for file in ROOT.glob("*_vlv.py")}
        assert published <= names
        # All of the package that git has, recipes, examples and drawings among it.
        assert set(_tracked("vlv")) <= names
        # The checkpoint is whole, and its code files are files, equal to the published ones, not links to them.
        for file in Path(tiny_checkpoint()).rglob("*"):
            if file.is_file():
                assert archive.read(file.relative_to(ROOT).as_posix()) == file.read_bytes()
        for name in published:
            assert archive.read(f"vlv/checkpoints/vlv-tiny/{name}") == (ROOT / name).read_bytes()


def test_demo_caption_reconstruct_and_evaluate(installed):
    assert "reconstructions.png" in installed("vlv", "demo", "--output", "demo")
    installed("vlv", "caption", "demo/scenes", "--output", "captions.jsonl")
    rows = [json.loads(line) for line in (installed.work / "captions.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(re.match("a (small|large) ", row["text"]) for row in rows)
    installed("vlv", "reconstruct", "demo/scenes", "--output", "rebuilt")
    assert (installed.work / "rebuilt" / "contact_sheet.png").is_file()
    installed("vlv", "evaluate", "--num", "8", "--output", "results.json")
    metrics = json.loads((installed.work / "results.json").read_text())["metrics"]
    assert metrics["captions/test/exact"]["n"] == 8


def test_training_by_the_name_of_a_recipe(installed):
    installed("vlv", "scenes", "--num", "60", "--split", "train", "--output", "scenes")
    settings = ["--max_steps", "2", "--eval_size", "8", "--per_device_train_batch_size", "4"]
    installed("vlv", "train", "finetune-caption", "--dataset", "scenes", "--output_dir", "trained", *settings)
    record = json.loads((installed.work / "trained" / "training.json").read_text())
    assert record["steps"] == 2
    installed("vlv", "caption", "scenes/000000.png", "--model", "trained", "--output", "trained.jsonl")


def test_publish_builds_and_proves(installed):
    model = tiny_checkpoint()
    installed("vlv", "publish", model, "--repo-id", "ada/vlv", "--space", "ada/app", "--dry-run", "--output", "repo")
    assert {"LICENSE", "README.md", "modeling_vlv.py"} <= {file.name for file in (installed.work / "repo").iterdir()}
    assert (installed.work / "repo-space" / "spaces_app.py").is_file()
    assert len(list((installed.work / "repo-space" / "examples").glob("*.png"))) == 6


def test_app_serves_its_page_and_examples(installed):
    process = installed.start("vlv", "app", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        url = next(found[0] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        for _ in range(600):  # the address is printed when the server answers, or a moment before
            try:
                page = urllib.request.urlopen(url, timeout=60).read().decode()
                break
            except OSError:
                time.sleep(0.5)
        assert "vlv-tiny" in page and "000000.png" in page
    finally:
        process.terminate()
        process.wait()
