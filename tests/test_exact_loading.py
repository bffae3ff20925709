"""What is saved is what is loaded, bit for bit, in a process that has never seen the model."""

import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from modeling_vlv import VLVForConditionalGeneration, VLVModel

PARTS_BUT_THE_LLM = ["encoder", "projection", "text_encoder", "unet", "vae", "prefix_projection"]
# Loads each folder as a stranger would and writes down its weights, its caption embeddings and a caption's logits.
FRESH = """
import sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModel
inputs = load_file(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        output = model(inputs["pixel_values"], input_ids=inputs["input_ids"])
    tensors = {name: weight.clone().contiguous() for name, weight in model.state_dict().items()}
    tensors |= {"output logits": output.logits, "output caption_embeds": output.caption_embeds}
    save_file(tensors, folder / "seen.safetensors")
"""


def test_fresh_process(tmp_path, tiny_repo):
    pixel_values, _ = tiny.pixels(2)
    inputs = {"pixel_values": pixel_values, "input_ids": torch.arange(12).reshape(2, 6)}
    save_file(inputs, tmp_path / "inputs.safetensors")
    models = {}
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        models[folder] = VLVModel.from_pretrained(tiny_repo, dtype=dtype).eval()
        models[folder].save_pretrained(folder)
    command = [sys.executable, "-c", FRESH, str(tmp_path / "inputs.safetensors"), *map(str, models)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for folder, model in models.items():
        seen = load_file(folder / "seen.safetensors")
        with torch.no_grad():
            output = model(inputs["pixel_values"], input_ids=inputs["input_ids"])
        assert torch.equal(seen.pop("output logits"), output.logits)
        assert torch.equal(seen.pop("output caption_embeds"), output.caption_embeds)
        assert seen.keys() == model.state_dict().keys()
        for name, weight in model.state_dict().items():
            assert weight.dtype == seen[name].dtype and torch.equal(weight, seen[name]), name


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_language_model(bits, tiny_repo, tiny_model):
    """Only the LLM is quantised; all before it stays as it was, to the last bit."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, llm_int8_skip_modules=[*PARTS_BUT_THE_LLM, "lm_head"]
    )
    model = VLVForConditionalGeneration.from_pretrained(tiny_repo, quantization_config=quantisation).eval()
    assert "bitsandbytes" in type(model.caption_head.model.layers[0].mlp.up_proj).__module__
    pixel_values, _ = tiny.pixels(2)
    with torch.no_grad():
        assert torch.equal(model.encode(pixel_values), tiny_model.encode(pixel_values))
    assert len(model.generate(pixel_values, max_new_tokens=3)) == 2


def test_a_captioner_never_reads_the_decoder(tmp_path, tiny_model):
    """It loads from a repo whose shards of UNet and VAE are gone."""
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    rest = {name: weight for name, weight in weights.items() if not name.startswith(("unet.", "vae."))}
    assert len(rest) < len(weights)
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = VLVForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixel_values, _ = tiny.pixels(1)
    with torch.no_grad():
        assert torch.equal(model.eval().encode(pixel_values), tiny_model.encode(pixel_values))
    assert VLVModel.from_pretrained(tmp_path, decoder_config=None).unet is None
