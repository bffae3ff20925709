"""The package as a user installs it: the wheel in a new environment, and an empty folder to work in."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from paths import ROOT


def tracked(*folders: str) -> list[str]:
    """The files in git: those of `folders`, or all."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def build_wheel(folder: Path) -> Path:
    """Builds from a copy of the files in git, because a build leaves a folder that would get into the next wheel."""
    source = folder / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source]
    subprocess.run([sys.executable, *command], check=True)
    (path,) = folder.glob("vlv-*.whl")
    return path


class Installed:
    """
    An environment with the wheel and the libraries of this environment.

    Args:
        wheel: from [`build_wheel`].
        folder: an empty folder for the environment.
    """

    def __init__(self, wheel: Path, folder: Path):
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self.bin = folder / "venv" / "bin"
        subprocess.run([self.bin / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
        (site_packages,) = (folder / "venv" / "lib").glob("*/site-packages")
        # A .pth file names a folder to search, in which .pth files are not read: no editable vlv comes with it.
        (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.environment |= {"HF_HUB_OFFLINE": "1"}
        self.environment["PATH"] = os.pathsep.join(
            [str(self.bin), str(Path(sys.executable).parent), os.environ["PATH"]]
        )
        self.folder = folder / "work"
        self.folder.mkdir()
        found = self("python", "-c", "import vlv, modeling_vlv; print(vlv.__file__); print(modeling_vlv.__file__)")
        assert all(str(site_packages) in line for line in found.splitlines())

    def start(self, program: str, *arguments: object, **options) -> subprocess.Popen:
        """Starts a program of the environment, by default in its work folder."""
        command = [self.bin / program if (self.bin / program).exists() else program, *map(str, arguments)]
        return subprocess.Popen(command, text=True, **{"cwd": self.folder, "env": self.environment, **options})

    def __call__(self, program: str, *arguments: object, **options) -> str:
        """Runs a program to its end and returns its output."""
        process = self.start(program, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        out, err = process.communicate()
        assert process.returncode == 0, f"{program} {arguments}\n{err[-3000:]}"
        return out
