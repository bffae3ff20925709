"""
The paper's configuration at full size: Florence-2-large, Stable Diffusion 2.1-base, Qwen2.5-0.5B, random bf16 weights.

    python benchmarks/published_size.py [--dtype float32] [--device cuda] [--folder DIR] [--output results.json]

Writes such a checkpoint (5.2 GB; it is deleted at the end, unless --folder is given). Then it captions an image, takes
one stage-1 step and makes one reconstruction step, each in a new process, and prints the peak memory of each without
the imports. A machine with 24 GB of memory and no GPU is enough. On a CPU without bf16 instructions, --dtype float32
takes more memory and a tenth of the time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import measure
import torch

from modeling_vlv import VLVForConditionalGeneration, VLVModel
from vlv.files import atomic_writer
from vlv.models.published import published_config


def make(folder: Path) -> None:
    """Writes a checkpoint of the published size in shards, one part at a time."""
    torch.set_default_dtype(torch.bfloat16)
    config = published_config("0.5B")
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = VLVModel(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    # One block of noise, repeated. New noise for 2.7 billion weights would take longer than everything else.
    noise = torch.randn(2**20 + 3, generator=generator) * 0.02
    for name, weight in model.state_dict().items():
        if weight.ndim < 2:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            weight.flatten().copy_(noise.repeat(weight.numel() // len(noise) + 1)[: weight.numel()])
    model.save_pretrained(folder, max_shard_size="1GB")


def pixels(device: str, side: int) -> torch.Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device) * 2 - 1


def caption(folder: Path, device: str, dtype: str) -> None:
    """Eight tokens. UNet and VAE are neither built nor read."""
    model = VLVForConditionalGeneration.from_pretrained(folder, device_map=device, dtype=dtype)
    assert model.unet is None and model.vae is None
    ids = model.generate(pixels(device, 768), max_new_tokens=8, min_new_tokens=8)
    assert ids.shape == (1, 8)


def train(folder: Path, device: str, dtype: str) -> None:
    """One step of stage 1 at batch size 1. The weights that train are in fp32, with AdamW's two states."""
    model = VLVModel.from_pretrained(folder, caption_config=None, device_map=device, dtype=dtype)
    model.set_stage("autoencode").train()
    model.gradient_checkpointing_enable()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=5e-5)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=dtype != "float32"):
        loss = model(pixels(device, 768), decoder_pixel_values=pixels(device, 384)).loss
    loss.backward()
    before = model.queries.detach().clone()
    optimizer.step()
    assert not torch.equal(model.queries, before)


def reconstruct(folder: Path, device: str, dtype: str) -> None:
    """One sampling step at 384x384 with guidance, and the decoding."""
    model = VLVModel.from_pretrained(folder, caption_config=None, device_map=device, dtype=dtype)
    (image,) = model.reconstruct(pixels(device, 768), num_inference_steps=1)
    assert image.size == (384, 384)


PHASES = {phase.__name__: phase for phase in (caption, train, reconstruct)}


def peak(device: str) -> dict[str, float]:
    """Peak memory in GiB: of the process since its start, and of the accelerator."""
    status = Path("/proc/self/status").read_text()
    peaks = {"host": int(status.split("VmHWM:")[1].split()[0]) / 2**20}
    if torch.device(device).type == "cuda":
        peaks["device"] = torch.cuda.max_memory_allocated() / 2**30
    return peaks


def run(phase: str, folder: Path, device: str, dtype: str) -> None:
    imports = peak(device)
    start = time.perf_counter()
    PHASES[phase](folder, device, dtype)
    used = {f"{place}_gib": value - imports[place] for place, value in peak(device).items()}
    print(json.dumps({"phase": phase, "seconds": time.perf_counter() - start, **used}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="dtype to compute in")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--folder", type=Path, help="folder to keep the checkpoint in, or an earlier one to use")
    parser.add_argument("--output", type=Path, help="JSON file to write the numbers to")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        run(arguments.phase, arguments.folder, arguments.device, arguments.dtype)
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "config.json").is_file():
            make(folder)
        settings = ["--folder", str(folder), "--device", arguments.device, "--dtype", arguments.dtype]
        for phase in PHASES:
            command = [sys.executable, __file__, "--phase", phase, *settings]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(result.stdout.splitlines()[-1]))
            print(
                *(f"{name}: {value:.2f}" if name != "phase" else value for name, value in rows[-1].items()), flush=True
            )
    if arguments.output is not None:
        on_gpu = torch.device(arguments.device).type == "cuda"
        processor = torch.cuda.get_device_name(arguments.device) if on_gpu else measure.processor_name()
        machine = {"processor": processor, "cores": os.cpu_count(), "dtype": arguments.dtype}
        versions = {name: version(name) for name in ("torch", "transformers", "diffusers")}
        with atomic_writer(arguments.output) as file:
            file.write(json.dumps({"phases": rows, **machine, "versions": versions}, indent=2) + "\n")


if __name__ == "__main__":
    main()
