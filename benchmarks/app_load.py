"""
The app under load: many visitors at once, visitors who leave, and many large photos.

    python benchmarks/app_load.py [--seconds 120] [--visitors 20] [--photos 500] [--baseline FILE] [--output FILE]

The app runs on the bundled checkpoint in a process of its own, with two threads, on the CPU.

`visitors`: each asks for captions over and over, of pictures whose captions are known. Every fourth one asks for a
reconstruction of 50 steps and leaves in the middle of it. Right answers, and the seconds that the others wait.
`photos`: captions of 12-megapixel photos, one after the other. The process's memory as they go by.

`--baseline` names the `spaces_app.py` of an earlier version, which runs the same in turn: its checkout must lie around
it. It answers how much the visitors who leave cost the others.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import gradio_client
import numpy as np
import psutil
from measure import at_least_one
from PIL import Image

from vlv import bundled_checkpoint
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.models.loading import load_captioner
from vlv.provenance import git_commit
from vlv.scenes import write_scenes

ROOT = Path(__file__).resolve().parents[1]
PHOTO = (4000, 3000)


class RunningApp:
    """`spaces_app.py` as a process of its own."""

    def __init__(self, script: Path, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "log.txt"
        environment = {
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_TEMP_DIR": str(folder / "uploads"),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "2",
            "PYTHONPATH": str(script.parent),
        }
        command = [sys.executable, "-u", str(script), "--model", bundled_checkpoint("vlv-tiny")]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})

    def __enter__(self) -> "RunningApp":
        while "Running on local URL" not in self.log.read_text():
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text())
            time.sleep(0.1)
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()

    def client(self) -> gradio_client.Client:
        return gradio_client.Client(self.url, verbose=False)

    def memory(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss


def known_captions(files: list[Path]) -> list[str]:
    """What the package's own captioner writes."""
    captioner = Captioner(*load_captioner(bundled_checkpoint("vlv-tiny"), "cpu"), Decoding())
    images = ((file.name, Image.open(file)) for file in files)
    return [captions[0].text for _, captions in captioner.caption_images(images)]


def visit(app: RunningApp, files: list[Path], captions: list[str], visitors: int, seconds: float) -> dict:
    end = time.monotonic() + seconds
    waits, wrong, left, lock = [], [], [0], threading.Lock()

    def visitor(number: int) -> None:
        client, turn = app.client(), number
        leaves = number % 4 == 3
        while time.monotonic() < end:
            file = files[turn % len(files)]
            if leaves:
                job = client.submit(gradio_client.handle_file(file), 50, api_name="/reconstruct")
                time.sleep(1)
                job.cancel()
                with lock:
                    left[0] += 1
            else:
                start = time.monotonic()
                caption = client.predict(gradio_client.handle_file(file), api_name="/caption")
                with lock:
                    waits.append(time.monotonic() - start)
                    if caption != captions[turn % len(files)]:
                        wrong.append((file.name, caption))
            turn += 1

    threads = [threading.Thread(target=visitor, args=(number,)) for number in range(visitors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waits.sort()
    return {
        "visitors": visitors,
        "captions": len(waits),
        "wrong": len(wrong),
        "runs_left": left[0],
        "median_wait": statistics.median(waits),
        "longest_wait": waits[-1],
        "wait_of_95_in_100": waits[int(0.95 * len(waits))],
    }


def photos(app: RunningApp, folder: Path, count: int) -> dict:
    """Each photo is another one: nothing can be kept from the last."""
    client, memory = app.client(), []
    noise = np.random.default_rng(0).integers(0, 255, (PHOTO[1] // 40, PHOTO[0] // 40, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize(PHOTO)
    file = folder / "photo.jpg"
    for number in range(count):
        picture.putpixel((number, 0), (255, 0, 0))
        picture.save(file, quality=85)
        client.predict(gradio_client.handle_file(file), 8, api_name="/caption")
        memory.append(app.memory())
    tenth = max(1, count // 10)
    return {
        "photos": count,
        "pixels": PHOTO[0] * PHOTO[1],
        "bytes_after": {str(place + 1): memory[place] for place in range(tenth - 1, count, tenth)},
        "growth_of_last_half": memory[-1] / memory[count // 2 - 1] if count > 1 else 1.0,
        "peak_bytes": max(memory),
    }


def measure(script: Path, arguments: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        scenes = write_scenes(folder / "scenes", 16, split="test")
        files = sorted(Path(scenes).glob("*.png"))
        captions = known_captions(files)
        with RunningApp(script, folder) as app:
            result = {"load": visit(app, files, captions, arguments.visitors, arguments.seconds)}
            if arguments.photos:
                result["memory"] = photos(app, folder, arguments.photos)
            result["tracebacks"] = app.log.read_text().count("Traceback")
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--visitors", type=at_least_one, default=20)
    parser.add_argument("--photos", type=at_least_one, default=500)
    parser.add_argument("--baseline", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    sides = {"this version": measure(ROOT / "spaces_app.py", arguments)}
    if arguments.baseline:
        sides["baseline"] = measure(
            arguments.baseline.resolve(), argparse.Namespace(**{**vars(arguments), "photos": 0})
        )
    record = {"benchmark": "app load", "commit": git_commit(), "cores": os.cpu_count(), "sides": sides}
    if arguments.baseline:
        new, old = (sides[name]["load"] for name in ("this version", "baseline"))
        record["ratios"] = {name: old[name] / new[name] for name in ("median_wait", "longest_wait")}
    text = json.dumps(record, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
