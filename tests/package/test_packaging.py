"""The dependencies, their versions, and the contents of the wheel."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from paths import ROOT
from transformers.dynamic_module_utils import get_relative_import_files

from modeling_vlv import CODE_FILES
from vlv import bundled_checkpoint

# vLLM brings its own versions of torch and transformers, so it has an environment of its own.
APART = {"vllm"}


@pytest.fixture
def project():
    """The `[project]` table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _pins(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


def test_constraints_pin_every_direct_dependency_inside_its_range(project):
    pins = _pins("constraints.txt")
    extras = [
        line
        for name, lines in project["optional-dependencies"].items()
        if name not in {"all", *APART}
        for line in lines
    ]
    for line in project["dependencies"] + extras:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line


def test_oldest_constraints_are_the_lower_ends(project):
    pins = _pins("constraints-oldest.txt")
    lower_ends = {}
    for requirement in map(Requirement, project["dependencies"]):
        lower_ends |= {
            canonicalize_name(requirement.name): s.version for s in requirement.specifier if s.operator == ">="
        }
    assert Version(lower_ends.pop("torch")) <= Version(pins.pop("torch"))  # see the note in the file
    assert pins == lower_ends


def test_extra_all_is_every_extra_of_this_environment(project):
    extras = dict(project["optional-dependencies"])
    (everything,) = map(Requirement, extras.pop("all"))
    assert everything.name == project["name"] and everything.extras == extras.keys() - APART


def test_every_imported_package_is_declared(project):
    """Each import of another project's package is a dependency, or belongs to an extra."""
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    # Imported only if they are installed.
    declared |= {"spaces", "liger-kernel"}
    modules = {file.stem for file in ROOT.glob("*.py") if file.stem != "setup"}
    own = modules | {"vlv", "vlv_app"}
    installed = packages_distributions()
    folders = [file for name in ("vlv", "vlv_app") for file in (ROOT / name).rglob("*.py")]
    for file in [*(ROOT / f"{name}.py" for name in modules), *folders]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.partition(".")[0] for name in names} - own - sys.stdlib_module_names:
                packages = {canonicalize_name(package) for package in installed.get(name, [name])}
                assert packages & declared, f"{file.name} imports {name}"


def test_every_list_names_the_published_files():
    """A file that is missing in a list would be missing in the wheel, in a saved repo or in the bundled checkpoint."""
    published = {file.name for file in ROOT.glob("*_vlv.py")}
    assert set(CODE_FILES) == published
    assert {file.name for file in Path(bundled_checkpoint()).glob("*.py")} == published
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    modules = {Path(name).stem for name in published}
    assert modules | {"hub_upload", "spaces_app"} == set(settings["setuptools"]["py-modules"])
    assert modules < set(settings["ruff"]["lint"]["isort"]["known-first-party"])
    assert published <= set(re.findall(r"`(\w+\.py)`", (ROOT / "docs" / "architecture.md").read_text()))


def test_the_model_imports_all_published_files():
    """transformers copies the files from a Hub repo that it finds through the relative imports of the model's file."""
    found = {Path(file).name for file in get_relative_import_files(ROOT / "modeling_vlv.py")}
    assert found | {"modeling_vlv.py"} == set(CODE_FILES)


def test_published_files_import_only_what_a_hub_user_has():
    allowed = {"transformers", "diffusers", "torch", "safetensors", "PIL", "numpy"} | sys.stdlib_module_names
    allowed |= {Path(name).stem for name in CODE_FILES}
    for name in CODE_FILES:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {module.partition(".")[0] for module in imported} <= allowed, name


def test_each_published_file_imports_all_that_it_needs():
    """From a folder, transformers 5.0 copies only the files that a file imports itself, not what those import."""
    for name in CODE_FILES:
        needed = {Path(file).name for file in get_relative_import_files(ROOT / name)} - {name}
        named = {
            f"{module}.py"
            for module in re.findall(r"^\s+from \.(\w+) import", (ROOT / name).read_text(), re.MULTILINE)
        }
        assert needed == named - {name}, name


def test_what_a_space_gets_does_not_import_the_package():
    """A Space has `spaces_app.py` and `vlv_app`; only the default model and the collections look for `vlv`."""
    for file in sorted((ROOT / "vlv_app").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert "vlv" not in {module.partition(".")[0] for module in imported}, file.name
