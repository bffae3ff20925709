"""Where a result comes from: the commit of the code, the state of a model, the images."""

import hashlib
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download


def git_commit() -> str | None:
    """The commit of the checkout that holds this file; `None` when no checkout holds it."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def digest(value: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(source: str) -> str:
    """
    An identifier of one state of a model. For a folder it is a hash of the sizes and times of its weights and of the
    text of its configs; for a Hub id it is the commit.
    """
    folder = Path(source)
    if not folder.is_dir():
        return Path(snapshot_download(source, local_files_only=True)).name
    weights = [file for pattern in ("*.safetensors", "*.bin") for file in folder.rglob(pattern)]
    configs = [file for file in folder.rglob("*.json") if file.name.startswith(("config", "processor", "scheduler"))]
    return digest(
        [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(weights)]
        + [[str(file.relative_to(folder)), file.read_text(encoding="utf-8")] for file in sorted(configs)]
    )


def fingerprint_images(images: Iterable[bytes]) -> str:
    """A short hash of the bytes of a dataset's image files, in order."""
    total = hashlib.sha256()
    for image in images:
        total.update(hashlib.sha256(image).digest())
    return total.hexdigest()[:12]
