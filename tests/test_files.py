import os
import signal
import time

import pytest

from vlv.files import atomic_writer, locked


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
