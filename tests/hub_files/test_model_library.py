"""What users do with any model of transformers: pickle it, export it, add adapters."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from paths import ROOT

BY_ITSELF = """
import sys
from processing_vlv import VLVProcessor
VLVProcessor.from_pretrained(sys.argv[1])
assert "modeling_vlv" not in sys.modules

import pickle
import torch
from transformers import AutoModel, AutoModelForImageTextToText
for auto_class in (AutoModel, AutoModelForImageTextToText):
    model = auto_class.from_pretrained(sys.argv[1], trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    copy = pickle.loads(pickle.dumps(model))
    assert type(copy) is type(model)
    assert all(torch.equal(*pair) for pair in zip(copy.parameters(), model.parameters(), strict=True))
"""


@pytest.mark.slow
def test_no_question_is_asked_and_models_of_remote_code_are_pickled(tiny_repo, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", BY_ITSELF, str(tiny_repo)]
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.run(command, cwd=tmp_path, env=environment, **options)
    assert run.returncode == 0, run.stdout
    assert "custom code" not in run.stdout  # the processor would ask to trust the code of the repo


def exported(model, inputs, lengths=()):
    """The model, exported with a dynamic batch size and with dynamic lengths for the inputs in `lengths`."""
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {name: {0: dynamic, 1: dynamic} if name in lengths else {0: dynamic} for name in inputs}
    return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()


@pytest.mark.slow
@torch.no_grad()
def test_a_model_is_exported_with_dynamic_batch_and_caption_length(tiny_model):
    processor = tiny.processor()
    inputs = {"pixel_values": tiny.pixels(3)[0], **processor(text=["a cat", "dogs", "sky"], return_labels=True)}
    program = exported(tiny_model, inputs, lengths=("input_ids", "attention_mask", "labels"))
    others = {
        "pixel_values": tiny.pixels(2, seed=1)[0],
        **processor(text=["two small cats", "ox"], return_labels=True),
    }
    output, expected = program(**others), tiny_model(**others)
    for name in ("caption_embeds", "context", "logits", "loss"):
        torch.testing.assert_close(output[name], expected[name])


@pytest.mark.slow
@torch.no_grad()
def test_the_denoising_loss_is_exported_with_a_dynamic_batch(tiny_model):
    def inputs(count):
        latents, noise = torch.randn(2, count, 4, 8, 8)
        timesteps = torch.tensor([10, 500, 900])[:count]
        return {"pixel_values": tiny.pixels(count)[0], "latents": latents, "noise": noise, "timesteps": timesteps}

    program, others = exported(tiny_model, inputs(3)), inputs(2)
    torch.testing.assert_close(program(**others).loss, tiny_model(**others).loss)


@pytest.mark.parametrize(("name", "written"), [("someone/vlv", "someone/vlv"), (str(ROOT), None)])
def test_adapters_name_their_base_model_only_where_it_is_an_id(name, written, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny.model(decoder_config=None)
    model.name_or_path = name
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == written
    assert str(ROOT) not in (tmp_path / "adapter_config.json").read_text()
