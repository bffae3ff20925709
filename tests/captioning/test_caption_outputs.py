"""The output of `vlv caption`: which run may write it, what is kept in it, and the errors for damaged output."""

import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tiny

from vlv.captioning.journal import Journal
from vlv.captioning.outputs import FORMATS, JsonLines, Parquet, Sidecars, open_output
from vlv.captioning.sink import Sink
from vlv.cli import main
from vlv.files import locked
from vlv.images import find_images


def _rows(*names, text="a dog", first=0):
    return [{"order": [number, 0], "file_name": name, "text": text} for number, name in enumerate(names, first)]


def _write(output, *names, settings=None, resume=False, overwrite=False, text="a dog"):
    """One run, as in the command: images that have a caption are left out."""
    sink = Sink(output, settings or {}, resume, overwrite)
    sink.add(_rows(*(name for name in names if name not in sink.done), text=text))
    return sink.finish()


def _read(path):
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name, image in zip(["a.png", "b.png", "sub/c.png"], tiny.images(3), strict=True):
        image.save(folder / name)
    return folder


def _sidecars(*paths, **options):
    return Sidecars(find_images(paths), ".txt", **options)


@pytest.fixture(params=[*FORMATS, ".txt"])
def open_again(request, photos, tmp_path):
    """Opens an output of each kind, as a new run would."""
    name = request.param if request.param == ".txt" else str(tmp_path / f"captions{request.param}")
    return lambda: open_output(name, find_images([photos]), several=False, existing="skip")


# ---- which run may write -------------------------------------------------------------------------------------


def test_a_second_run_into_one_output_is_refused(tiny_repo, photos, tmp_path, capsys):
    outputs = {"caption": tmp_path / "captions.jsonl", "reconstruct": tmp_path / "rebuilt"}
    outputs["reconstruct"].mkdir()
    for command, output in outputs.items():
        with locked(output):
            assert main([command, str(photos), "--model", str(tiny_repo), "--output", str(output)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"vlv {command}: error: Another run is writing to {output}")
    with locked(photos / "captions.txt"):
        assert main(["caption", str(photos), "--model", str(tiny_repo), "--output", ".txt"]) == 2
    assert "Another run is writing to" in capsys.readouterr().err
    for arguments in (["scenes", "--num", "1"], ["export", str(tiny_repo)], ["evaluate", "--num", "1"]):
        with locked(tmp_path / "out", beside=True):
            assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
        assert f"Another run is writing to {tmp_path / 'out'}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_resume_with_other_settings_is_refused_before_any_work(open_again):
    settings = {"model": "vlv-tiny", "num_beams": 4}
    _write(open_again(), "a.png", settings=settings)
    output = open_again()
    with pytest.raises(ValueError, match="was made with --num_beams 4: --resume adds to it with the same settings"):
        Sink(output, {**settings, "num_beams": 1}, resume=True)
    assert not output.journal.folder.exists()
    assert _write(output, "b.png", settings=settings, resume=True)[0] == 1
    assert open_again().names() == {"a.png", "b.png"}


def test_the_command_remembers_its_settings(tiny_repo, photos, tmp_path, capsys, monkeypatch):
    def caption(*options):
        arguments = ["caption", str(photos), "--output", str(tmp_path / "out.parquet"), "--max_new_tokens", "3"]
        return main([*arguments, *options])

    monkeypatch.chdir(tiny_repo.parent)
    assert caption("--model", tiny_repo.name) == 0
    capsys.readouterr()
    assert caption("--model", str(tiny_repo), "--resume", "--num_captions", "2", "--num_beams", "2") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "was made with --num_beams 1, --num_captions 1: --resume" in line
    assert caption("--model", str(tiny_repo), "--resume") == 0  # the same model by another name
    assert "0 captioned" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", FORMATS)
def test_one_caption_and_lists_do_not_mix(suffix, tmp_path):
    """Also if the settings of the file are unknown."""
    path = tmp_path / f"captions{suffix}"
    _write(FORMATS[suffix](path), "a")
    path.with_name(f".{path.name}.settings").unlink()
    with pytest.raises(ValueError, match="text is one caption and this run would add a list.*same --num_captions"):
        Sink(FORMATS[suffix](path, several=True), {}, resume=True)
    _write(FORMATS[suffix](path, several=True), "a", overwrite=True, text=["a dog", "a cat"])
    assert _read(path) == [{"file_name": "a", "text": ["a dog", "a cat"]}]


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_output_is_replaced_only_with_overwrite(suffix, tmp_path):
    path = tmp_path / f"metadata{suffix}"
    path.touch()
    _write(FORMATS[suffix](path), "a")  # an empty file may be replaced
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="already exists: add to it with --resume, or replace it with --over"):
        _write(FORMATS[suffix](path), "b")
    assert path.read_bytes() == before
    path.chmod(0o640)
    _write(FORMATS[suffix](path), "b", overwrite=True)
    assert _read(path) == [{"file_name": "b", "text": "a dog"}]
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_was_written_by_hand_during_an_interrupted_run_stays(tmp_path):
    path = tmp_path / "metadata.jsonl"
    Sink(JsonLines(path), {}, resume=False).add(_rows("a"))
    path.write_text('{"file_name": "b", "text": "by hand"}\n')
    assert _write(JsonLines(path), "a", resume=True) == (1, [])
    assert [row["text"] for row in _read(path)] == ["by hand", "a dog"]


# ---- what is kept --------------------------------------------------------------------------------------------


def test_parquet_keeps_its_other_columns(tmp_path):
    path = tmp_path / "captions.parquet"
    schema = pyarrow.schema(
        [
            pyarrow.field("rating", pyarrow.int8(), nullable=False),
            pyarrow.field("text", pyarrow.large_string()),
            pyarrow.field("file_name", pyarrow.string()),
            pyarrow.field("seen", pyarrow.timestamp("ns")),
        ],
        {"huggingface": "{}"},
    )
    rows = {"rating": [5, 3], "text": ["mine", "yours"], "file_name": ["a", "b"], "seen": [1, 2**60 + 1]}
    table = pyarrow.table(rows, schema=schema)
    pyarrow.parquet.write_table(table, path)
    assert _write(Parquet(path), "a", "c", resume=True) == (1, [])
    after = pyarrow.parquet.read_table(path)
    assert after.slice(0, 2).to_pydict() == table.to_pydict()
    assert after.slice(2).to_pylist() == [{"rating": None, "text": "a dog", "file_name": "c", "seen": None}]
    assert after.schema.names == schema.names and after.schema.types == schema.types
    assert after.schema.metadata[b"huggingface"] == b"{}"


def test_json_lines_stay_byte_for_byte(tmp_path):
    path = tmp_path / "captions.jsonl"
    before = b'{"text":"mine", "rating": 1.50, "file_name":"a"}\r\n{"file_name": "b", "text": "\\u00fc"}'
    path.write_bytes(before)
    assert _write(JsonLines(path), "b", "c", resume=True) == (1, [])
    assert path.read_bytes() == before + b'\n{"file_name": "c", "text": "a dog"}\n'


def test_a_link_stays_a_link_and_its_target_is_written(photos, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "captions.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(target)
    _write(JsonLines(link), "a")
    _write(JsonLines(link), "b", resume=True)
    assert link.is_symlink() and [row["file_name"] for row in _read(target)] == ["a", "b"]
    target, link = tmp_path / "elsewhere" / "a.txt", photos / "a.txt"
    target.touch()
    link.symlink_to(target)
    _write(_sidecars(photos), "a.png")
    assert link.is_symlink() and target.read_text() == "a dog\n"


# ---- a list of failures for each output -------------------------------------------------------------------------


def test_every_output_has_its_own_list_of_failures(open_again, tmp_path):
    outputs = [open_again(), JsonLines(tmp_path / "failures.jsonl"), Parquet(tmp_path / "failures.parquet")]
    for output in outputs:
        sink = Sink(output, {}, resume=False)
        sink.add(_rows("a.png") + [{"order": [9, 0], "file_name": "b.png", "error": f"broken for {output.path}"}])
        sink.finish()
    assert len({output.failures for output in outputs}) == 3
    for output in outputs:
        assert _read(output.failures) == [{"file_name": "b.png", "error": f"broken for {output.path}"}]
    assert _read(tmp_path / "failures.jsonl") == [{"file_name": "a.png", "text": "a dog"}]
    with pytest.raises(ValueError, match="is a name for a list of failures"):
        JsonLines(tmp_path / "a.failures.jsonl")


# ---- damaged outputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, problem",
    [
        (b"\n", "the line is empty"),
        (b'{"file_name": "b", "te\n', "the line is not valid JSON"),
        (b'{"file_name": "b", "te', "the line is not valid JSON"),
        (b'{"file_name": "b"}\n', "the row has no text"),
        (b'{"text": "b"}\n', "the row has no file_name"),
        (b'{"file_name": 3, "text": "b"}\n', "file_name is not text"),
        (b'{"file_name": "b", "text": null}\n', "text is neither text nor a list"),
        (b'["b"]\n', "the line is not a JSON object"),
        (b'{"file_name": "\xe9", "text": "b"}\n', "the line is not UTF-8 text"),
    ],
)
def test_an_output_edited_by_hand_gives_file_and_line(line, problem, tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_bytes(b'{"file_name": "a", "text": "a dog"}\n' + line)
    with pytest.raises(ValueError, match=rf"{path}, line 2: {problem}.*(correct|delete|add|save)"):
        Sink(JsonLines(path), {}, resume=True)


def test_a_byte_order_mark_gives_file_and_line(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"file_name": "a", "text": "a dog"}\n', encoding="utf-8-sig")
    with pytest.raises(ValueError, match=f"{path}, line 1: the file begins with a byte order mark"):
        Sink(JsonLines(path), {}, resume=True)


def test_damaged_parquet(tmp_path):
    path = tmp_path / "captions.parquet"
    path.write_bytes(b"PAR1 cut")
    with pytest.raises(ValueError, match=f"{path} is not a complete parquet file"):
        Sink(Parquet(path), {}, resume=True)
    pyarrow.parquet.write_table(pyarrow.table({"file_name": ["a"]}), path)
    with pytest.raises(ValueError, match=f"{path} has no column text"):
        Sink(Parquet(path), {}, resume=True)
    pyarrow.parquet.write_table(pyarrow.table({"file_name": ["a", None], "text": ["b", "c"]}), path)
    with pytest.raises(ValueError, match=f"{path}, row 2: file_name is empty"):
        Sink(Parquet(path), {}, resume=True)


# ---- sidecars ----------------------------------------------------------------------------------------------------


def test_an_empty_sidecar_does_not_count_as_captioned(photos):
    (photos / "a.txt").write_text("\n")
    (photos / "b.txt").write_text("by hand")
    assert Sink(_sidecars(photos), {}, resume=False).done == {"b.png"}


@pytest.mark.parametrize(
    "existing, text",
    [("skip", "by hand,"), ("overwrite", "a dog\n"), ("append", "by hand, a dog\n"), ("prepend", "a dog by hand,\n")],
)
def test_existing_sidecars(existing, text, photos):
    (photos / "a.txt").write_text("by hand,")
    for _ in range(2):  # nothing is added twice, by a second run or by a resumed run
        _write(_sidecars(photos, existing=existing), "a.png", "b.png", resume=True)
        assert (photos / "a.txt").read_text() == text
        assert (photos / "b.txt").read_text() == "a dog\n"


def test_several_captions_are_added_to_a_text_line_by_line(photos):
    (photos / "a.txt").write_text("ohwx,")
    _write(_sidecars(photos, several=True, existing="append"), "a.png", text=["a dog", "a big dog"])
    assert (photos / "a.txt").read_text() == "ohwx, a dog\nohwx, a big dog\n"


def test_text_that_cannot_be_added_to_is_refused_before_any_work(photos):
    (photos / "a.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{photos / 'a.txt'} is not UTF-8 text"):
        Sink(_sidecars(photos, existing="append"), {}, resume=False)
    assert Sink(_sidecars(photos), {}, resume=False).done == {"a.png"}


def test_an_image_deleted_between_run_and_resume_does_not_affect_the_others(photos):
    Sink(_sidecars(photos), {}, resume=False).add(_rows("a.png", "sub/c.png"))
    (photos / "sub" / "c.png").unlink()
    captioned, failures = _write(_sidecars(photos), "a.png", "b.png", resume=True)
    assert captioned == 2 and [row["file_name"] for row in failures] == ["sub/c.png"]
    assert "does not exist any more" in failures[0]["error"]
    assert {path.name for path in photos.rglob("*.txt")} == {"a.txt", "b.txt"}


def test_captions_of_images_that_a_resumed_run_does_not_name_are_written_too(photos):
    Sink(_sidecars(photos), {}, resume=False).add(_rows("a.png", "sub/c.png"))
    _write(_sidecars(photos / "a.png", photos / "b.png"), "a.png", "b.png", resume=True)
    assert (photos / "sub" / "c.txt").exists()


def test_images_on_two_file_systems(photos, tmp_path):
    """Their only common folder is the root of the disk, which must not be written to."""
    memory = Path("/dev/shm") / f"vlv-{os.getpid()}"
    if not memory.parent.is_dir() or memory.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    try:
        shutil.copytree(photos, memory)
        before = set(Path("/").iterdir())
        output = _sidecars(photos / "a.png", memory / "b.png")
        names = [file.name for file in find_images([photos / "a.png", memory / "b.png"])]
        Sink(output, {}, resume=False).add(_rows(names[0]))
        _write(_sidecars(photos / "a.png", memory / "b.png"), *names, resume=True)
        assert (photos / "a.txt").read_text() == (memory / "b.txt").read_text() == "a dog\n"
        assert set(Path("/").iterdir()) == before
        assert output.journal.folder.parent == photos
    finally:
        shutil.rmtree(memory)


def test_a_name_too_long_for_a_sidecar_does_not_affect_the_others(photos):
    long = f"{'n' * 251}.png"
    (photos / "b.png").rename(photos / long)
    output = Sidecars(find_images([photos]), ".caption")
    captioned, failures = _write(output, "a.png", long, "sub/c.png")
    assert captioned == 2 and "its name is too long for a sidecar" in failures[0]["error"]
    assert {path.name for path in photos.rglob("*.caption")} == {"a.caption", "c.caption"}


def test_sidecars_cannot_have_a_suffix_of_images(photos):
    with pytest.raises(ValueError, match="--output .png is a suffix of images"):
        Sidecars(find_images([photos]), ".png", existing="overwrite")
    with pytest.raises(ValueError, match="would overwrite the image"):
        Sidecars(find_images([photos / "a.png", photos / "b.png", _copy(photos / "a.png", "b.dat")]), ".dat")


def _copy(path, name):
    return shutil.copy(path, path.with_name(name))


# ---- disk errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["append", "finish"])
def test_an_output_folder_that_is_deleted_while_the_run_writes_to_it(moment, tmp_path):
    folder = tmp_path / "out"
    sink = Sink(JsonLines(folder / "captions.jsonl"), {}, resume=False)
    sink.add(_rows("a"))
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=f"{folder}.* was deleted or moved while the run was writing to it"):
        sink.add(_rows("b")) if moment == "append" else sink.finish()


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path):
    """A limit on the size of files stands for a full disk, because the system reports both in the same way."""
    output = tmp_path / "captions.jsonl"
    process = os.fork()
    if process == 0:
        status = 70
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            sink = Sink(JsonLines(output), {}, resume=False)
            sink.add(_rows("a"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
            try:
                sink.add(_rows(*map(str, range(100)), first=1))
            except OSError as error:
                right = str(sink.journal.folder) in str(error) and "cannot be written to" in str(error)
                status = 0 if right and error.__cause__.errno == errno.EFBIG else 71
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    kept = Journal(output.with_name(".captions.jsonl.partial")).names()
    assert "a" in kept and 1 < len(kept) < 101
    assert _write(JsonLines(output), "a", *map(str, range(100)), resume=True) == (101, [])
    assert len(_read(output)) == 101


def test_output_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="cannot be written: .*file is not a folder"):
        JsonLines(tmp_path / "file" / "captions.jsonl")
