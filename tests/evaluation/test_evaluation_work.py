"""The work that an evaluation keeps beside its results."""

import pytest

from vlv.evaluation.work import Work


def _rows(folder, total):
    made = []

    def make(start):
        for number in range(start, total):
            made.append(number)
            yield {"number": number}

    return Work(folder).rows("captions", {}, total, make), made


def test_an_incomplete_last_line_is_made_again(tmp_path):
    rows, made = _rows(tmp_path, 3)
    assert made == [0, 1, 2]
    (file,) = tmp_path.rglob("captions.jsonl")
    file.write_bytes(file.read_bytes()[:-4])
    assert _rows(tmp_path, 4) == ([{"number": number} for number in range(4)], [2, 3])
    assert rows == _rows(tmp_path, 3)[0][:3]


def test_a_damaged_line_is_named(tmp_path):
    _rows(tmp_path, 3)
    (file,) = tmp_path.rglob("captions.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b"{\n" + lines[2])
    with pytest.raises(ValueError, match=f"{file}, line 2: the line is not valid JSON"):
        _rows(tmp_path, 3)
