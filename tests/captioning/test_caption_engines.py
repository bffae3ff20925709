"""Several processes: Ray Data actors and `torchrun` give the same rows as the local engine."""

import subprocess
import sys

import datasets
import pytest
import tiny

from vlv.cli import main

COUNT = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a broken file, and a table."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "photos").mkdir()
    images = tiny.images(COUNT)
    for number, image in enumerate(images):
        image.save(folder / "photos" / f"{number:02}.png")
    (folder / "photos" / "05.png").write_text("no image")
    rows = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    rows.to_parquet(folder / "images.parquet")
    return [folder / "photos", folder / "images.parquet"]


def _arguments(inputs, repo, output):
    settings = ["--max_new_tokens", 6, "--temperature", 1, "--num_captions", 2, "--batch_size", 4]
    return list(map(str, [*inputs, "--model", repo, "--output", output, *settings]))


@pytest.fixture(scope="module")
def local(inputs, tiny_repo, tmp_path_factory):
    output = tmp_path_factory.mktemp("local") / "captions.jsonl"
    assert main(["caption", *_arguments(inputs, tiny_repo, output)]) == 0
    return output.read_bytes(), output.with_name("captions.jsonl.failures.jsonl").read_bytes()


def _check(output, local):
    assert output.read_bytes() == local[0]
    assert output.with_name("captions.jsonl.failures.jsonl").read_bytes() == local[1]
    assert len(list(output.parent.iterdir())) == 3  # and .captions.jsonl.settings


@pytest.mark.slow
def test_ray(inputs, tiny_repo, local, tmp_path):
    pytest.importorskip("ray", reason="vlv[ray] is not installed")
    output = tmp_path / "captions.jsonl"
    command = [sys.executable, "-m", "vlv", "caption", *_arguments(inputs, tiny_repo, output), "--engine", "ray"]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "left out" in result.stderr and "05.png" in result.stderr
    _check(output, local)


@pytest.mark.slow
def test_two_processes(inputs, tiny_repo, local, tmp_path):
    output = tmp_path / "captions.jsonl"
    logs = tmp_path.parent / "logs"  # one folder with the output of each process
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--redirects", "3", "--log_dir", logs]
    command = [sys.executable, "-m", *map(str, launch), "-m", "vlv", "caption", *_arguments(inputs, tiny_repo, output)]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)
    assert result.returncode == 0, result.stderr
    said = [file.read_text() for file in sorted(logs.rglob("stderr.log"))]
    assert [text.count(" captioned, ") for text in said] == [1, 0]  # two processes, one of which wrote the output
    _check(output, local)
