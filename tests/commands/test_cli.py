"""The `vlv` command itself: the overview, the errors, the exit status."""

import os
import signal
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version

import pytest

from vlv.cli import COMMANDS, Command, main


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Adds a command `sample`; `main` has the given body."""

    def add(body):
        (tmp_path / "sample_command.py").write_text(f"def main(argv):\n    {body}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "sample_command", raising=False)
        monkeypatch.setitem(COMMANDS, "sample", Command("sample_command", "does what a test asks"))

    return add


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_overview_names_every_command(argv, capsys):
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert any(line.split()[:1] == [name] and line.endswith(command.summary) for line in lines)


def test_overview_and_wrong_names_load_no_library():
    code = (
        "import sys; from vlv.cli import main; main(['--help']); main(['captoin']);"
        "print([name for name in ('torch', 'transformers', 'numpy', 'PIL') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps(name, capsys):
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    help_text = capsys.readouterr().out
    assert f"vlv {name}" in help_text
    assert "(default: None)" not in help_text


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_option_is_one_line(name, capsys):
    try:
        status = main([name, "--no_such_option", "1"])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vlv {name}: error: ")


def test_misspelt_option_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["caption", "a.png", "--num_bems", "4"])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--num_bems" in line and "did you mean --num_beams?" in line


@pytest.mark.parametrize("seed", [-1, 10**20])
@pytest.mark.parametrize(
    "command",
    [
        "caption a.png",
        "reconstruct a.png --output new",
        "score photos --output new.jsonl",
        "serve",
        "evaluate --output new.json",
        "scenes --output new",
        "demo --output new",
    ],
)
def test_a_seed_out_of_range_is_refused(command, seed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "--seed", str(seed)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"error: --seed is {seed}; it must be between 0 and {2**63 - 1}.")
    assert not list(tmp_path.iterdir())


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlv {version('vlv')}\n"


@pytest.mark.parametrize(
    "name, hint", [("captoin", "did you mean caption?"), ("xyz", f"choose from {', '.join(COMMANDS)}")]
)
def test_unknown_command(name, hint, capsys):
    assert main([name]) == 2
    assert capsys.readouterr().err == f"vlv: error: there is no command '{name}'; {hint}\n"


def test_arguments_and_status_pass_through(command):
    command("return len(argv)")
    assert main(["sample", "a", "--b", "c"]) == 3
    assert main(["sample"]) == 0


@pytest.mark.parametrize(
    "error, line",
    [
        ("ValueError('The size is 3;\\n  give 4.')", "The size is 3; give 4."),
        ("FileNotFoundError('a.png: there is no such file.')", "a.png: there is no such file."),
        ("PermissionError(13, 'Permission denied', 'a.png')", "a.png: Permission denied"),
        ("ValueError()", "ValueError"),
    ],
)
def test_input_errors_are_one_line(error, line, command, capsys):
    command(f"raise {error}")
    assert main(["sample"]) == 2
    assert capsys.readouterr().err == f"vlv sample: error: {line}\n"


def test_bugs_keep_their_traceback(command):
    command("raise KeyError('a bug')")
    with pytest.raises(KeyError):
        main(["sample"])


def _start(body, tmp_path):
    """Starts `vlv sample`, with the given body, as a process."""
    (tmp_path / "sample_command.py").write_text(f"import time\ndef main(argv):\n    {body}\n")
    code = (
        "import sys; from vlv.cli import COMMANDS, Command, main;"
        "COMMANDS['sample'] = Command('sample_command', ''); sys.exit(main(['sample']))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test runner in the background ignores Ctrl-C, and its child processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_ends_cleanly(tmp_path):
    process = _start("print('started', flush=True); time.sleep(60)", tmp_path)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error == "\nvlv sample: interrupted\n"


def _sample(folder, **options):
    """Starts `vlv sample`, the command in the folder's `sample_command.py`, as a shell does."""
    code = (
        "import sys; from vlv.cli import COMMANDS, Command, main;"
        "COMMANDS['sample'] = Command('sample_command', ''); sys.argv = ['vlv', 'sample']; sys.exit(main())"
    )
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)


def test_ctrl_c_leaves_no_traceback_of_threads_and_child_processes(tmp_path):
    """A terminal sends Ctrl-C to every process of the command, and a user may send it again while the command ends."""
    (tmp_path / "sample_command.py").write_text(
        "import atexit, multiprocessing, threading, time\n"
        "ending = threading.Event()\n"
        "def fail():\n"
        "    ending.wait()\n"
        "    raise RuntimeError('the main thread has left')\n"
        "@atexit.register\n"
        "def end():\n"
        "    print('ending', flush=True)\n"
        "    time.sleep(1)\n"
        "def main(argv):\n"
        "    thread = threading.Thread(target=fail)\n"
        "    thread.start()\n"
        "    with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "        waiting = pool.map_async(time.sleep, [60, 60])\n"
        "        time.sleep(1)\n"
        "        try:\n"
        "            print('started', flush=True)\n"
        "            waiting.get()\n"
        "        finally:\n"
        "            ending.set()\n"
    )
    process = _sample(
        tmp_path,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in ("started\n", "ending\n"):
        assert process.stdout.readline() == line
        os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "\nvlv sample: interrupted\n"


def test_a_pipe_shows_at_once_what_a_command_prints(tmp_path):
    (tmp_path / "sample_command.py").write_text(
        "import sys\ndef main(argv):\n    print('started')\n    sys.stdin.read()\n"
    )
    with _sample(tmp_path, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == "started\n"  # it goes on until stdin is closed
    assert process.returncode == 0


def test_a_closed_output_ends_the_command_quietly(tmp_path):
    process = _start("[print(number) for number in range(10**6)]", tmp_path)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.wait(timeout=30) == 1
    assert process.stderr.read() == ""


def test_module_runs_as_the_command():
    result = subprocess.run([sys.executable, "-m", "vlv", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"vlv {version('vlv')}\n")


def test_registry_names_importable_modules():
    for name, command in COMMANDS.items():
        assert callable(import_module(command.module).main), name
