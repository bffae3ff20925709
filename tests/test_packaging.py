"""What is installed, with which versions, and what the wheel holds."""

import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from vlv import tiny_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup_arguments(monkeypatch):
    arguments = {}
    monkeypatch.setattr(setuptools, "setup", arguments.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return arguments


def _pins(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


def test_constraints_pin_every_direct_dependency_inside_its_range(setup_arguments):
    pins = _pins("constraints.txt")
    for line in setup_arguments["install_requires"] + setup_arguments["extras_require"]["all"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line


def test_oldest_constraints_are_the_lower_ends(setup_arguments):
    pins = _pins("constraints-oldest.txt")
    lower_ends = {}
    for requirement in map(Requirement, setup_arguments["install_requires"]):
        lower_ends |= {
            canonicalize_name(requirement.name): s.version for s in requirement.specifier if s.operator == ">="
        }
    assert Version(lower_ends.pop("torch")) <= Version(pins.pop("torch"))  # see the note in the file
    assert pins == lower_ends


def test_extra_all_is_every_extra(setup_arguments):
    extras = dict(setup_arguments["extras_require"])
    everything = extras.pop("all")
    assert set(everything) == {requirement for extra in extras.values() for requirement in extra}


def test_published_files_do_not_import_the_workbench():
    for path in ROOT.glob("*_vlv.py"):
        assert not re.search(r"^\s*(from|import) vlv\b", path.read_text(), re.MULTILINE), path.name


@pytest.mark.slow
def test_wheel_holds_code_and_checkpoint(tmp_path):
    # From a copy: building leaves its own folder behind, whose contents would get into the next wheel.
    ignored = shutil.ignore_patterns(".*", "build", "dist", "demo", "outputs", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source], check=True
    )
    (path,) = tmp_path.glob("vlv-*.whl")
    assert path.stat().st_size < 30e6
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        published = {file.name for file in ROOT.glob("*_vlv.py")}
        assert len(published) == 5 and published <= names
        workbench = {file.relative_to(ROOT).as_posix() for file in (ROOT / "vlv").rglob("*.py")}
        assert workbench <= names
        # The checkpoint is whole, and its code files are files, equal to the published ones, not links to them.
        for file in Path(tiny_checkpoint()).rglob("*"):
            if file.is_file():
                assert wheel.read(file.relative_to(ROOT).as_posix()) == file.read_bytes()
        for name in published:
            assert wheel.read(f"vlv/checkpoints/vlv-tiny/{name}") == (ROOT / name).read_bytes()
        assert "vlv/checkpoints/vlv-tiny/config.json" in names
