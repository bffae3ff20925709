"""A thousand damaged images through every way in: no traceback, the readable ones answered, memory bounded."""

import json
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest
from damaged import READABLE, write_damaged
from datasets import Dataset, Features, Image, Value

MOST_MEMORY = 2 * 2**30


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    names = write_damaged(folder)
    assert len(names) > 990
    (folder / "list.txt").write_text("".join(f"{folder / name}\n" for name in names))
    return folder, names


class Watch:
    """The most memory that a process and those that it started held together, shared memory counted once."""

    def __init__(self, process):
        self.process, self.most, self._ended = psutil.Process(process), 0, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self):
        while not self._ended.wait(0.3):
            held = 0
            with suppress(psutil.Error):  # one has ended meanwhile
                for process in [self.process, *self.process.children(recursive=True)]:
                    held += process.memory_full_info().pss
            self.most = max(self.most, held)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()


def _run(*arguments):
    """Runs a command to its end, within the memory; returns what it said on stderr."""
    command = [sys.executable, "-m", "vlv", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with Watch(process.pid) as watch:
        _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert "Traceback" not in errors
    print(f"{arguments[0]}: {watch.most / 2**20:.0f} MB at most")
    return errors, watch.most


def _count(command, names, answered, left_out):
    """Every image is answered or left out, and those that are whole are answered."""
    assert sorted([*answered, *left_out]) == sorted(names)
    kinds = Counter(name.partition("/")[0] for name in answered)
    print(f"{command}: {len(answered)} answered ({dict(kinds)}), {len(left_out)} left out")
    missing = [name for name in left_out if name.startswith(READABLE)]
    assert not missing


def _names(path):
    return [row["file_name"] for row in map(json.loads, path.read_text("utf-8").splitlines())]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_caption(damaged, tiny_repo, tmp_path):
    folder, names = damaged
    output = tmp_path / "captions.jsonl"
    _, most = _run("caption", folder / "list.txt", "--model", tiny_repo, "--output", output, "--max_new_tokens", 3)
    _count("caption", names, _names(output), _names(output.with_name("captions.jsonl.failures.jsonl")))
    assert most < MOST_MEMORY


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_reconstruct(damaged, tiny_repo, tmp_path):
    folder, names = damaged
    settings = ["--num_inference_steps", 1, "--guidance_scale", 1]
    errors, most = _run("reconstruct", folder / "list.txt", "--model", tiny_repo, "--output", tmp_path, *settings)
    stems = {name.rpartition(".")[0]: name for name in names}
    answered = [stems[str(path.relative_to(tmp_path).with_suffix(""))] for path in tmp_path.glob("*/*.png")]
    left_out = [name for name in names if f"left out: {folder / name}: " in errors]
    _count("reconstruct", names, answered, left_out)
    assert most < MOST_MEMORY


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_train(damaged, tiny_repo, tmp_path):
    folder, names = damaged
    rows = {
        "image": [{"bytes": (folder / name).read_bytes(), "path": name} for name in names],
        "text": [f"picture {number}" for number in range(len(names))],
    }
    features = Features({"image": Image(decode=False), "text": Value("string")})
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features).cast_column("image", Image()).to_parquet(tmp_path / "data" / "train.parquet")
    output = tmp_path / "out"
    settings = ["--eval_size", 8, "--max_steps", 2, "--save_steps", 2, "--eval_strategy", "no"]
    settings += ["--per_device_train_batch_size", 8, "--model", tiny_repo, "--dataset", tmp_path / "data"]
    _, most = _run("train", "tiny/caption", *settings, "--output_dir", output)
    left_out = _names(output / "failures.jsonl")
    _count("train", names, set(names).difference(left_out), left_out)
    assert most < MOST_MEMORY


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_app(damaged, tiny_repo, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    from running_app import App

    folder, names = damaged
    with App(tmp_path / "log.txt", "--model", tiny_repo) as app, Watch(app.process.pid) as watch:

        def ask(some):
            client, errors = app.client(), {}  # two threads cannot share a client
            for name in some:
                try:
                    client.predict(gradio_client.handle_file(folder / name), 8, 1, api_name="/caption")
                except (gradio_client.exceptions.AppError, ValueError) as error:
                    errors[name] = str(error)
            return errors

        with ThreadPoolExecutor(2) as threads:
            first, second = threads.map(ask, [names[::2], names[1::2]])
    errors = first | second
    print(f"app: {watch.most / 2**20:.0f} MB at most")
    assert "Traceback" not in app.log.read_text()
    assert [name for name, error in errors.items() if name.rpartition("/")[2] not in error] == []
    _count("app", names, set(names).difference(errors), errors)
    assert watch.most < MOST_MEMORY
