import pytest

from vlv.files import atomic_writer


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
