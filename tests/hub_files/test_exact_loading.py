"""A saved model is loaded bit for bit in a new process."""

import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from modeling_vlv import VLVForConditionalGeneration, VLVModel

# Loads each folder as a user without this package would. Writes down its weights, its caption embeddings and a
# caption's logits.
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


def assert_same_in_a_fresh_process(models, folder):
    """Saves the models, given by name, into `folder`, loads them in a new process, and compares them."""
    inputs = {"pixel_values": tiny.pixels(2)[0], "input_ids": torch.arange(12).reshape(2, 6)}
    save_file(inputs, folder / "inputs.safetensors")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    folders = [str(folder / name) for name in models]
    command = [sys.executable, "-c", FRESH, str(folder / "inputs.safetensors"), *folders]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr
    for name, model in models.items():
        seen = load_file(folder / name / "seen.safetensors")
        with torch.no_grad():
            output = model(inputs["pixel_values"], input_ids=inputs["input_ids"])
        assert torch.equal(seen.pop("output logits"), output.logits)
        assert torch.equal(seen.pop("output caption_embeds"), output.caption_embeds)
        weights = model.state_dict()
        assert seen.keys() == weights.keys()
        for key, weight in weights.items():
            assert weight.dtype == seen[key].dtype and torch.equal(weight, seen[key]), key


@pytest.mark.slow
def test_fresh_process(tmp_path, tiny_repo):
    dtypes = (torch.float32, torch.bfloat16)
    models = {str(dtype): VLVModel.from_pretrained(tiny_repo, dtype=dtype) for dtype in dtypes}
    assert_same_in_a_fresh_process(models, tmp_path)


@pytest.mark.slow
def test_a_quantised_language_model(tmp_path):
    """Only the LLM is quantised, as in docs/convert.md. All parts before it are unchanged, bit for bit."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantised model is tested")
    from transformers import BitsAndBytesConfig

    not_the_llm = ["encoder", "projection", "text_encoder", "unet", "vae", "prefix_projection", "lm_head"]
    # On some processors, bitsandbytes packs 4-bit weights in blocks. The width of a layer must be a multiple of them.
    whole = VLVModel(tiny.config(caption_config=tiny.caption_config(hidden_size=64))).eval()
    whole.save_pretrained(tmp_path / "repo")
    models = {}
    for setting in ("load_in_8bit", "load_in_4bit"):
        quantisation = BitsAndBytesConfig(**{setting: True}, llm_int8_skip_modules=not_the_llm)
        model = VLVModel.from_pretrained(tmp_path / "repo", quantization_config=quantisation)
        quantised = {name for name, module in model.named_modules() if "bitsandbytes" in type(module).__module__}
        linears = {f"self_attn.{name}_proj" for name in "qkvo"} | {
            f"mlp.{name}_proj" for name in ("gate", "up", "down")
        }
        assert quantised == {f"caption_head.model.layers.{layer}.{name}" for layer in (0, 1) for name in linears}
        pixel_values, _ = tiny.pixels(2)
        with torch.no_grad():
            assert torch.equal(model.encode(pixel_values), whole.encode(pixel_values))
        assert len(model.generate(pixel_values, max_new_tokens=3)) == 2
        models[setting] = model
    assert_same_in_a_fresh_process(models, tmp_path)


def test_a_captioner_never_reads_the_decoder(tmp_path, tiny_model):
    """It loads from a repo in which the shards of UNet and VAE are deleted."""
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
