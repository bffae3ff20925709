"""A checkpoint of the paper's stage 2 that is large enough to measure its memory, and the measurement."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from paths import FIXTURES
from transformers import Qwen2Config, Qwen2ForCausalLM

PARITY = FIXTURES / "parity"
# Runs the given code and prints its peak memory in MB, without the memory of the imports.
MEASURE = r"""
import re, sys
from pathlib import Path
import vlv.models.convert
from modeling_vlv import VLVForConditionalGeneration, VLVModel
def peak():
    # Not getrusage: its peak begins with that of the process that started this one.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
baseline = peak()
exec(sys.argv[1])
print("MB", peak() - baseline)
"""


def write_checkpoint(folder, layers=34):
    """`model.pt`, 2.1 GB of fp32 with the default layers, and `llm/`, the folder of its language model's config."""
    folder = Path(folder)
    config = json.loads((PARITY / "components" / "qwen" / "config.json").read_text())
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": layers}
    config = Qwen2Config(**{**config, **sizes, "layer_types": None})
    config.save_pretrained(folder / "llm")
    tensors = torch.load(PARITY / "stage2" / "step_3" / "model.pt", weights_only=True)
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("VLV_model.")}
    with torch.device("meta"):
        llm = Qwen2ForCausalLM(config).state_dict()
    shapes = {f"qwen2_model.{name}": weight.shape for name, weight in llm.items() if name != "lm_head.weight"}
    for layer, inputs in ((0, 64), (2, 1024)):
        shapes |= {f"mlp.layers.{layer}.weight": (1024, inputs), f"mlp.layers.{layer}.bias": (1024,)}
    for number, (name, shape) in enumerate(shapes.items()):
        tensors[name] = torch.full(shape, number / 1000)
    torch.save(tensors, folder / "model.pt")
    return folder / "model.pt"


def measure(code):
    """Peak memory of `code` in a new process, in MB, without the imports."""
    result = subprocess.run([sys.executable, "-c", MEASURE, code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return float(result.stdout.split()[-1])
