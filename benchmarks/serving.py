"""
The endpoint under load: `vlv serve` against the engine of `vlv caption`.

    python benchmarks/serving.py [--size tiny|mid|published] [--images 500] [--at_once 32] [--output FILE]

`batch engine` captions a folder of drawn scenes, as `vlv caption` does. `endpoint` is a process of `vlv serve`, which
gets the same images from this one, each as a request of its own, 32 at the same time: a client sends its next request
when it has its answer. Client and server share the machine. Every answer must be the caption that the engine wrote. At
the sizes whose weights are random, captions have 90 tokens each, the median of the paper's.
"""

import asyncio
import base64
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import measure

from vlv.captioning.captioner import Captioner
from vlv.captioning.engine import caption_locally
from vlv.captioning.settings import Decoding
from vlv.captioning.sources import open_source
from vlv.models.loading import load_captioner
from vlv.scenes import write_scenes


class Engine:
    """Captions the folder; the batch that memory allows is found in its first turn."""

    def __init__(self, model: str, folder: Path, decoding: Decoding, device: str, dtype: str):
        self.source = open_source([str(folder)])
        self.captioner = Captioner(*load_captioner(model, device, dtype), decoding)
        self.captions: dict[str, str] = {}

    def __call__(self) -> float:
        return measure.seconds_of(self.work) / len(self.captions)

    def work(self) -> None:
        rows = [row for batch in caption_locally(self.source, (), self.captioner) for row in batch]
        self.captions = {row["file_name"]: row["text"] for row in rows}


class Clients:
    """Send the images of the folder, several at the same time."""

    def __init__(self, address: str, folder: Path, at_once: int):
        self.address, self.at_once = address, at_once
        self.bodies = {file.name: body(file) for file in sorted(folder.glob("*.png"))}
        self.answers: dict[str, str] = {}
        self.latencies: list[list[float]] = []  # of each turn, in seconds

    def __call__(self) -> float:
        return measure.seconds_of(lambda: asyncio.run(self.work())) / len(self.bodies)

    async def work(self) -> None:
        waiting = list(self.bodies.items())
        self.answers, latencies = {}, []

        async def client(session):
            while waiting:
                name, content = waiting.pop()
                start = time.perf_counter()
                async with session.post("/v1/chat/completions", data=content) as response:
                    answer = await response.json()
                latencies.append(time.perf_counter() - start)
                if response.status != 200:
                    raise RuntimeError(f"{name}: {answer['error']['message']}")
                self.answers[name] = answer["choices"][0]["message"]["content"]

        async with aiohttp.ClientSession(self.address) as session:
            await asyncio.gather(*(client(session) for _ in range(self.at_once)))
        self.latencies.append(latencies)


def body(file: Path) -> bytes:
    url = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    return json.dumps({"messages": [{"role": "user", "content": content}]}).encode()


def start_server(model: str, decoding: Decoding, device: str, dtype: str) -> tuple[subprocess.Popen, str]:
    """A process of `vlv serve` on a free port, and its address."""
    command = [sys.executable, "-m", "vlv", "serve", "--model", model, "--port", "0", "--device", device]
    command += ["--dtype", dtype, "--timeout", "600", "--max_new_tokens", str(decoding.max_new_tokens)]
    server = subprocess.Popen(
        [*command, "--min_new_tokens", str(decoding.min_new_tokens)], stderr=subprocess.PIPE, text=True
    )
    for line in server.stderr:
        if found := re.search(r"answers at (http://[^/]+)", line):
            return server, found[1]
    raise SystemExit(f"vlv serve ended with status {server.wait()}.")


def main() -> None:
    parser = measure.parser(__doc__, default_images=500)
    parser.add_argument("--at_once", type=measure.at_least_one, default=32, help="requests at the same time")
    arguments = parser.parse_args()
    device = measure.find_device(arguments.size)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    length = measure.MEDIAN
    decoding = Decoding() if arguments.size == "tiny" else Decoding(max_new_tokens=length, min_new_tokens=length)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_scenes(Path(temporary) / "scenes", arguments.images, seed=0, split="test")
        model = measure.checkpoint(arguments.size, Path(temporary) / "model")
        server, address = start_server(model, decoding, str(device), dtype)
        try:
            engine = Engine(model, folder, decoding, str(device), dtype)
            clients = Clients(address, folder, arguments.at_once)
            seconds = measure.take_turns({"batch engine": engine, "endpoint": clients})
        finally:
            server.terminate()
            server.wait()
    found = measure.compare(seconds, "batch engine")
    found["batch engine"]["batch_size"] = engine.captioner.batch_size
    latencies = sorted(latency for turn in clients.latencies[1:] for latency in turn)
    cuts = statistics.quantiles(latencies, n=100)
    equal = sum(clients.answers[name] == caption for name, caption in engine.captions.items()) / len(engine.captions)
    found["endpoint"] |= {"p50_seconds": cuts[49], "p95_seconds": cuts[94], "answers_equal": equal}
    print(f"p50 {cuts[49]:.3f} s, p95 {cuts[94]:.3f} s; answers equal to the engine's: {equal:.3f}")
    measure.write(
        arguments.output,
        "serving",
        arguments.size,
        found,
        images=arguments.images,
        at_once=arguments.at_once,
        dtype=dtype,
    )


if __name__ == "__main__":
    main()
