"""
Loading a captioner: time and memory until it can caption. The whole model is compared with this package's default.

    python benchmarks/loading.py [--size tiny|mid|published] [--output FILE]

`paper` loads everything, as the reference implementation does. `as shipped` is what `vlv caption` does: it neither
builds nor reads UNet and VAE. Each turn is a new process. Time and memory do not include imports.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
import torch

from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.models.loading import load_captioner


def peak() -> int:
    """The most bytes that this process has held."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def paper(folder: str, device: torch.device) -> VLVModel:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    VLVProcessor.from_pretrained(folder)
    return VLVModel.from_pretrained(folder, dtype=dtype).to(device)


def as_shipped(folder: str, device: torch.device) -> VLVModel:
    return load_captioner(folder, str(device))[0]


MODES = {"paper": paper, "as shipped": as_shipped}


def load(mode: str, folder: str, size: str) -> None:
    device, imported = measure.find_device(size), peak()
    torch.zeros(1, device=device)
    start = time.perf_counter()
    model = MODES[mode](folder, device)
    for parameter in model.parameters():  # weights are mapped from the file, and read at the first access
        parameter.sum()
    found = {"seconds": time.perf_counter() - start, "peak_bytes": peak() - imported}
    if device.type == "cuda":
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps(found))


class Side:
    def __init__(self, mode: str, folder: str, size: str):
        self.command = [sys.executable, __file__, "--size", size, "--load", mode, "--folder", folder]

    def __call__(self) -> float:
        result = subprocess.run(self.command, stdout=subprocess.PIPE, text=True, check=True)
        self.found = json.loads(result.stdout.splitlines()[-1])
        return self.found.pop("seconds")


def main() -> None:
    parser = measure.parser(__doc__, default_images=1)
    parser.add_argument("--load", choices=MODES, help="(of a turn) what to load")
    parser.add_argument("--folder", help="(of a turn) the checkpoint")
    arguments = parser.parse_args()
    if arguments.load:
        load(arguments.load, arguments.folder, arguments.size)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = measure.checkpoint(arguments.size, Path(temporary))
        sides = {name: Side(name, folder, arguments.size) for name in MODES}
        found = measure.compare(measure.take_turns(sides), "paper")
    for name, side in sides.items():
        found[name] |= side.found
    measure.write(arguments.output, "loading", arguments.size, found, unit="one loading in place of one image")


if __name__ == "__main__":
    main()
