"""docs/training.md, followed word for word."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text()


@pytest.mark.slow
def test_fine_tuning_on_your_own_folder_word_for_word(tmp_path):
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL))
    assert shell.count("vlv train") == 2
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shell],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    captions = [json.loads(line)["text"] for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert len(captions) == 200
    assert sum(caption.startswith("view: a ") for caption in captions) > 150
    record = json.loads((tmp_path / "my_captioner" / "training.json").read_text())
    assert record["steps"] == 90 and record["resumed_from"] == "checkpoint-80"
    assert "| view: a " in (tmp_path / "my_captioner" / "samples" / "step-80.md").read_text()
