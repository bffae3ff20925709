"""Reading in separate processes: a picture that crashes its decoder does not affect the others."""

import faulthandler
import os
import re
import signal
import sys
import time
from functools import partial

import datasets
import pytest
import tiny
import torch
from PIL import Image

from vlv import reading
from vlv.captioning import engine
from vlv.cli import main
from vlv.data.rows import open_image
from vlv.images import ImageFile, read_images
from vlv.reading import Reader, read_ahead
from vlv.training.cache import Images
from vlv.training.vlv_stage import read_row


def _numbered(count):
    return [(number, f"{number}.png") for number in range(count)]


def _crash():
    faulthandler.disable()  # pytest's own report of it
    os.kill(os.getpid(), signal.SIGSEGV)


def _read(source):
    """A tensor with the number of the source. Sources 3 and 5 end the process as faulty decoders do."""
    number = int(source.partition(".")[0])
    if number == 3:
        _crash()
    if number == 5:
        os._exit(3)
    if number == 7:
        raise ValueError(f"{source}: this is not an image.")
    return torch.full((2, 2), number)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_crash_loses_only_one_picture(num_workers):
    read = list(read_ahead(_numbered(20), _read, num_workers, number=6))
    assert [key for key, _, _ in read] == list(range(20))
    errors = {key: error for key, _, error in read if error is not None}
    crashed = "the process that read it crashed"
    assert errors == {
        3: f"3.png: {crashed} (SIGSEGV). The file is damaged, or its decoder is faulty.",
        5: f"5.png: {crashed} (exit status 3). The file is damaged, or its decoder is faulty.",
        7: "7.png: this is not an image.",
    }
    assert all(torch.equal(result, torch.full((2, 2), key)) for key, result, error in read if error is None)


def test_without_processes_it_is_read_here():
    here = os.getpid()
    assert {pid for _, pid, _ in read_ahead(_numbered(3), lambda source: os.getpid(), 0, 2)} == {here}
    assert here not in {pid for _, pid, _ in read_ahead(_numbered(3), lambda source: os.getpid(), 1, 2)}


def test_a_picture_that_takes_too_long_is_left_out():
    def read(source):
        while source == "slow.png":
            pass
        return source

    with Reader(read, seconds=0.5) as reader:
        with pytest.raises(ValueError, match=r"^slow.png: reading it took more than 0.5 seconds\.$"):
            reader("slow.png")
        assert reader("next.png") == "next.png"


def test_a_reader_that_died_while_idle_is_replaced():
    with Reader(lambda source: os.getpid()) as reader:
        first = reader("a.png")
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        assert reader("b.png") != first


def test_a_reader_in_a_forked_process_has_its_own_process():
    with Reader(lambda source: os.getppid()) as reader:
        assert reader("a.png") == os.getpid()
        child = os.fork()
        if child == 0:
            os._exit(reader("b.png") != os.getpid())
        assert os.waitpid(child, 0)[1] == 0
        assert reader("c.png") == os.getpid()


def test_large_pictures_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIXELS_AT_ONCE", 5_000_000)
    sources = [tmp_path / f"{number}.png" for number in range(6)]
    for source in sources:
        Image.new("1", (2000, 1500)).save(source)  # two of them exceed the limit of pixels at once
    busy = tmp_path / "busy"

    def read(source):
        busy.mkdir()  # fails while another process is reading
        time.sleep(0.05)
        busy.rmdir()

    assert [error for _, _, error in read_ahead(enumerate(sources), read, 3, 6)] == [None] * 6


def test_results_need_neither_shared_memory_nor_a_file_each():
    def files():
        return len(os.listdir("/proc/self/fd")), sorted(os.listdir("/dev/shm"))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("the system does not list open files")
    before, shared = files()
    count = 100
    read = read_ahead(_numbered(count), lambda source: torch.zeros(64, 64), 2, number=count)
    kept = [next(read) for _ in range(count // 2)]
    opened, still_shared = files()
    assert opened - before < 10 and still_shared == shared
    assert len(kept + list(read)) == count
    assert files() == (before, shared)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, they end when their time is up")
@pytest.mark.parametrize("ended", ["closed", "killed"])
def test_readers_end_with_their_parent(ended):
    """
    Every reader keeps a pipe open, so the pipe ends when the last reader has ended. All pictures but the first one
    take for ever.
    """

    def read_first(source):
        while source != "0.png":
            time.sleep(1)

    alive, held = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(alive)
        read = read_ahead(_numbered(9), read_first, 3, number=3)
        next(read)
        if ended == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        read.close()
        os._exit(0)
    os.close(held)
    os.waitpid(child, 0)
    assert os.read(alive, 1) == b""
    os.close(alive)


def test_all_readers_skip_a_picture_that_crashes(tmp_path):
    """The readers of `vlv reconstruct`, of caches, of training and of evaluation."""
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path, image in zip(paths, tiny.images(4), strict=True):
        image.save(path)
    bad = Image.open(paths[2]).convert("RGB").tobytes()

    def crash(image):
        if image.tobytes() == bad:
            _crash()
        return {"size": torch.tensor(image.size)}

    sentence = f"{paths[2]}: the process that read it crashed (SIGSEGV)."
    problems = []
    read = list(read_images([ImageFile(path, path.name) for path in paths], problems.append, crash))
    assert [file.name for file, _ in read] == ["0.png", "1.png", "3.png"]
    assert len(problems) == 1 and sentence in problems[0]

    rows = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(path)} for path in paths]})
    first, second = Images(rows, "image", crash).batches(range(4), 3, 0)
    assert [reason and reason[: len(sentence)] for reason in first["unreadable"] + second["unreadable"]] == [
        *("", "", sentence, "")
    ]
    assert first["size"].tolist() == [[40, 30], [40, 30], [8, 8]]

    with Reader(lambda row: crash(open_image(row))) as reader:
        row = partial(read_row, read=reader, image_column="image", caption_column=None)
        assert row(rows[1])["size"].tolist() == [40, 30]
        with pytest.raises(ValueError, match=re.escape(sentence)):
            row(rows[2])


def test_caption_skips_a_picture_that_crashes_its_decoder(tiny_repo, tmp_path, monkeypatch, capsys):
    """Also with few images and with the default settings."""
    for number, image in enumerate(tiny.images(4)):
        image.save(tmp_path / f"{number}.png")

    def crash(path, real=engine.read_image):
        if path.name == "2.png":
            _crash()
        return real(path)

    monkeypatch.setattr(engine, "read_image", crash)
    assert main(["caption", str(tmp_path), "--model", str(tiny_repo), "--max_new_tokens", "3"]) == 0
    output = capsys.readouterr()
    assert f"left out: {tmp_path / '2.png'}: the process that read it crashed (SIGSEGV)." in output.err
    assert [line.split("\t")[0] for line in output.out.splitlines()] == ["0.png", "1.png", "3.png"]
