"""Runs that are killed, interrupted and resumed lose nothing and repeat nothing."""

import itertools
import json
import os
import random
import signal
import sys
import threading
import time

import pyarrow.parquet
import pytest
import tiny
from tqdm import tqdm

from vlv.captioning import engine
from vlv.captioning.captioner import Captioner
from vlv.captioning.journal import Journal
from vlv.captioning.outputs import JsonLines
from vlv.captioning.sink import Sink
from vlv.cli import main

COUNT = 30


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(tiny.images(COUNT)):
        image.save(folder / f"{number:02}.png")
    (folder / "07.png").write_text("no image")
    (folder / "20.png").write_bytes(b"")
    return folder


def _caption(repo, photos, output, *options):
    arguments = ["caption", photos, "--model", repo, "--output", output, "--max_new_tokens", 4, "--batch_size", 3]
    return main(list(map(str, [*arguments, *options])))


@pytest.fixture(scope="module")
def whole(tiny_repo, photos, tmp_path_factory):
    """The captions and failures of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "captions.jsonl"
    assert _caption(tiny_repo, photos, output) == 0
    return output.read_bytes(), output.with_name("captions.jsonl.failures.jsonl").read_bytes()


def _fork(function):
    """The id of a process that runs the function and exits with its result."""
    process = os.fork()
    if process == 0:
        status = 70
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            tqdm.set_lock(threading.RLock())  # all forks share its own lock, and a killed one would keep it locked
            status = function() or 0
        finally:
            os._exit(status)
    return process


def _status(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _slowly(monkeypatch, seconds):
    """Makes each batch take longer by `seconds`."""
    caption = Captioner.__call__

    def slow(self, *arguments):
        time.sleep(seconds)
        return caption(self, *arguments)

    monkeypatch.setattr(Captioner, "__call__", slow)


def _check(output, whole):
    assert output.read_bytes() == whole[0]
    assert output.with_name("captions.jsonl.failures.jsonl").read_bytes() == whole[1]
    names = {path.name for path in output.parent.iterdir()}
    assert names == {"captions.jsonl", "captions.jsonl.failures.jsonl", ".captions.jsonl.settings"}


@pytest.mark.slow
def test_killed_at_random_times(tiny_repo, photos, whole, tmp_path, monkeypatch):
    """
    A run is killed at a random time within 0.2 s after the start of its first or second batch. No batch takes less
    than 0.1 s, so at most three of the ten batches are done. So three kills hit a run on a machine of any speed.
    """
    output = tmp_path / "captions.jsonl"
    _slowly(monkeypatch, 0.1)
    slow = Captioner.__call__
    randomly = random.Random(0)
    kills = 0
    for attempt in range(9):
        last, delay = randomly.randint(1, 2), randomly.uniform(0, 0.2)
        batches = itertools.count(1)

        def doomed(self, *arguments, batches=batches, last=last, delay=delay):
            if next(batches) == last:
                threading.Timer(delay, os.kill, [os.getpid(), signal.SIGKILL]).start()
            return slow(self, *arguments)

        monkeypatch.setattr(Captioner, "__call__", doomed if attempt < 8 else slow)
        status = _status(_fork(lambda: _caption(tiny_repo, photos, output, "--resume")))
        kills += status == -signal.SIGKILL
        if status == 0:
            break
        assert not output.exists() or output.read_bytes() == whole[0]
    assert kills > 2
    assert status == 0
    _check(output, whole)


@pytest.mark.parametrize("step", range(5))
def test_killed_while_the_output_is_made(tiny_repo, photos, whole, tmp_path, step):
    output = tmp_path / "captions.jsonl"

    def run():
        steps = iter(range(step))
        replace = os.replace

        def audit(event, arguments):
            if event == "os.rename" and next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        assert replace is os.replace
        return _caption(tiny_repo, photos, output)

    status = _status(_fork(run))
    # Captions, settings, failures and the journal are moved.
    assert status == (0 if step > 3 else -signal.SIGKILL)
    assert _caption(tiny_repo, photos, output, "--resume") == 0
    _check(output, whole)


def test_ctrl_c_ends_cleanly_and_resume_continues(tiny_repo, photos, whole, tmp_path, monkeypatch, capfd):
    output = tmp_path / "captions.jsonl"
    _slowly(monkeypatch, 0.3)
    process = _fork(lambda: _caption(tiny_repo, photos, output))
    while not list(tmp_path.glob(".captions.jsonl.partial/*.jsonl")):
        time.sleep(0.05)
    os.kill(process, signal.SIGINT)
    assert _status(process) == 130
    error = capfd.readouterr().err
    assert "vlv caption: interrupted: the same command with --resume continues from here" in error
    assert "Traceback" not in error
    assert not output.exists()
    monkeypatch.undo()

    assert _caption(tiny_repo, photos, output) == 2  # finished captions are not replaced without an option
    assert "An earlier run was interrupted: continue it with --resume, or delete" in capfd.readouterr().err
    assert _caption(tiny_repo, photos, output, "--resume", "--num_beams", "2") == 2
    assert "The interrupted run had --num_beams 1" in capfd.readouterr().err

    read = []
    monkeypatch.setattr(
        engine, "read_image", lambda path, real=engine.read_image: read.append(path.name) or real(path)
    )
    assert _caption(tiny_repo, photos, output, "--resume", "--num_workers", "0") == 0
    assert 0 < len(read) < COUNT and {"07.png", "20.png"} <= set(read)  # failures are tried again, captions are kept
    _check(output, whole)


def _names(output):
    if output.suffix == ".parquet":
        return pyarrow.parquet.read_table(output)["file_name"].to_pylist()
    return [json.loads(line)["file_name"] for line in output.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.slow
def test_resume_adds_to_a_finished_run(tiny_repo, photos, tmp_path, suffix):
    folder = tmp_path / "photos"
    folder.mkdir()
    output = tmp_path / f"captions.{suffix}"
    names = ["03.png", "01.png", "02.png"]
    for name in names:
        (folder / name).write_bytes((photos / name).read_bytes())
        assert _caption(tiny_repo, folder, output, "--resume") == 0
        before = output.read_bytes()
        assert _caption(tiny_repo, folder, output, "--resume") == 0
        assert output.read_bytes() == before
    assert _names(output) == names
    assert _caption(tiny_repo, folder, output, "--overwrite") == 0  # all images again
    assert _names(output) == sorted(names)


def test_a_journal_cut_anywhere_keeps_its_complete_rows(tmp_path):
    rows = [{"order": [number, 0], "file_name": f"ü{number}", "text": 'a\n"b" ü'} for number in range(5)]
    journal = Journal(tmp_path / "journal")
    journal.append(rows, {"settings": {}})
    (path,) = journal.folder.iterdir()
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = [row for row in rows if json.dumps(row, ensure_ascii=False).encode() in content[:length]]
        captioned, failures = journal.settle()
        assert list(journal.rows(captioned.values())) == whole
        assert failures == []
        assert journal.names() == {row["file_name"] for row in whole}


def test_images_of_one_name_are_reported(tmp_path):
    sink = Sink(JsonLines(tmp_path / "captions.jsonl"), {}, resume=False)
    sink.add([{"order": [0, row], "file_name": "a", "text": str(row)} for row in range(2)])
    captioned, failures = sink.finish()
    assert captioned == 1 and [row["error"] for row in failures] == ["a: another image has the same name."]
    assert (tmp_path / "captions.jsonl").read_text() == '{"file_name": "a", "text": "0"}\n'
