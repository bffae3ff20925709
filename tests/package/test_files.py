import os
import signal
import time

import pytest

from vlv.files import atomic_folder, atomic_writer, check_source, locked


def test_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    with atomic_writer(path) as file:
        file.write("é\n")
        assert not path.exists()
    assert path.read_bytes() == "é\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_interrupted_block_changes_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), atomic_writer(path) as file:
        file.write("half of ")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_is_refused_before_the_work(tmp_path):
    with pytest.raises(IsADirectoryError, match="name a file"), atomic_writer(tmp_path):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("name", ["folder", "file.jsonl"])
def test_a_second_run_is_refused_while_the_first_one_writes(name, tmp_path):
    (tmp_path / "folder").mkdir()
    output = tmp_path / name
    with locked(output):
        with pytest.raises(OSError, match=f"Another run is writing to {output}"), locked(output):
            pytest.fail("the block must not run")
        with locked(tmp_path / "another.jsonl"):
            pass
    with locked(output):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_a_killed_run_locks_nothing_even_while_its_own_children_live(tmp_path):
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        with locked(tmp_path):
            child = os.fork()
            if child:
                os.write(write, child.to_bytes(4, "big"))
            time.sleep(600)
    child = int.from_bytes(os.read(read, 4), "big")
    try:
        with pytest.raises(OSError), locked(tmp_path):
            pytest.fail("the block must not run")
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        with locked(tmp_path):
            assert os.kill(child, 0) is None  # still there
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_of_a_killed_run_is_not_left_behind(tmp_path):
    process = os.fork()
    if process == 0:
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    (tmp_path / "model").mkdir()  # an empty folder may be filled
    with atomic_folder(tmp_path / "model") as folder:
        with pytest.raises(OSError, match="Another run is writing to"), atomic_folder(tmp_path / "model"):
            pytest.fail("the block must not run")
        (folder / "whole").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["whole"]


@pytest.mark.parametrize("name", ["./runs/caption", "/no/such/model", "a/b/c", "~/model", "runs/caption"])
def test_the_hub_is_not_asked_for_a_missing_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match=f"There is no file or folder {name}"):
        check_source(name)


def test_ids_on_the_hub_are_not_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "Qwen/Qwen2.5-0.5B", "florence-community/Florence-2-large"):
        check_source(name)
