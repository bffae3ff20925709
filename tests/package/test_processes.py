"""Commands in several processes: the work is divided, or the launch is refused, and a lost process is reported."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny
from accelerate import PartialState

from vlv.cli import main
from vlv.processes import check_launch

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]


@pytest.fixture
def alone(monkeypatch):
    """This process, without the state that earlier tests have left in accelerate."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    PartialState._reset_state()
    yield PartialState(cpu=True)
    PartialState._reset_state()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(tiny.images(12)):
        image.save(folder / f"{number:02}.png")
    (folder / "05.png").write_text("no image")
    return folder


def command(*argv):
    return ["-m", "vlv", *map(str, argv)]


def start(launcher, *argv, **environment):
    return subprocess.Popen(
        [*launcher, *command(*argv)],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


@pytest.mark.parametrize("argv", [["caption", "{}"], ["train", "tiny/caption", "--output_dir", "{}"]])
def test_launch_of_one_process_instead_of_several_is_refused(argv, alone, monkeypatch, tmp_path, photos, capsys):
    # The environment that accelerate launch sets for the one process that it starts.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert main([part.format(photos) for part in argv]) == 2
    assert "use torchrun --nproc_per_node N" in capsys.readouterr().err


def test_processes_that_do_not_find_each_other_are_refused(alone, monkeypatch):
    check_launch(alone)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes, but this process finds 1"):
        check_launch(alone)


def test_fsdp_without_gpus_is_refused(alone, monkeypatch, photos, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["train", "tiny/caption", "--output_dir", str(photos), "--dataset", str(photos)]) == 2
    assert "vlv train: error: FSDP shards a model over several GPUs" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["reconstruct", "evaluate", "info"])
def test_a_command_for_one_process_refuses_a_launcher(name, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main([name]) == 2
    assert f"vlv {name}: error: it runs in one process" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_divides_the_images(photos, tiny_repo, tmp_path):
    """Both processes print captions. One process prints the summary, which counts all captions."""
    done = start([*TORCHRUN, "--standalone"], "caption", photos, "--model", tiny_repo)
    captions, said = done.communicate(timeout=600)
    assert done.returncode == 0, said
    names = [line.split("\t")[0] for line in captions.splitlines()]
    assert sorted(names) == sorted(file.name for file in photos.iterdir() if file.name != "05.png")
    assert said.count(" captioned, ") == 1 and "11 captioned, 1 left out" in said


@pytest.mark.slow
def test_accelerate_on_a_cpu_says_that_it_starts_one_process(photos, tiny_repo, tmp_path):
    output = tmp_path / "captions.jsonl"
    done = start(ACCELERATE, "caption", photos, "--model", tiny_repo, "--output", output)
    _, said = done.communicate(timeout=600)
    assert done.returncode != 0 and not output.exists()
    assert "vlv caption: error: accelerate launch starts one process on a CPU" in said


@pytest.mark.slow
def test_killed_process_is_not_waited_for(photos, tiny_repo, tmp_path):
    """The processes are started by hand, because a launcher would end the other process."""
    output = tmp_path / "captions.jsonl"
    argv = ["caption", photos, "--model", tiny_repo, "--output", output, "--batch_size", "1", "--num_workers", "0"]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    first, second = (start([sys.executable], *argv, **group, RANK=str(n), LOCAL_RANK=str(n)) for n in range(2))
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob(".captions*/*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    _, said = first.communicate(timeout=600)
    assert first.returncode == 2
    assert "vlv caption: error: Another process of this run ended" in said and "Traceback" not in said
    assert not output.exists()
    assert main([*map(str, argv), "--resume"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 11
