"""The devices of the model's weights, and that no tensor is left on another device."""

import copy
import subprocess
import sys

import accelerate
import pytest
import tiny
import torch
import transformers
from paths import ROOT

from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.models.rebuilding import reconstruct_images, see

no_offload_in_5_0 = pytest.mark.skipif(
    transformers.__version__.startswith("5.0."), reason="transformers 5.0 cannot offload its own models on a CPU"
)


def assert_answers_as(model, expected, pixel_values, captions):
    """Compares each public method alone, and the forward pass between them."""
    reconstruction = {"num_inference_steps": 2, "output_type": "pt"}
    for step in (
        lambda model: model.encode(pixel_values),
        lambda model: model.generate(pixel_values, max_new_tokens=5, do_sample=False),
        lambda model: model(pixel_values, **captions).loss,
        lambda model: model.reconstruct(pixel_values, generator=torch.Generator().manual_seed(0), **reconstruction),
        lambda model: model.encode(pixel_values),
    ):
        torch.testing.assert_close(step(model), step(expected))


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_device_map_places_every_weight(tiny_repo, tiny_model, device_map, pixel_values, captions):
    model = type(tiny_model).from_pretrained(tiny_repo, device_map=device_map)
    assert not any(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(model.cpu()(pixel_values, **captions).loss, tiny_model(pixel_values, **captions).loss)


@torch.no_grad()
@no_offload_in_5_0
@pytest.mark.parametrize("parts", ["some", "all"])
def test_weights_can_be_offloaded_to_disk(tiny_repo, tiny_model, pixel_values, captions, tmp_path, parts):
    names = [name for name, _ in tiny_model.named_children()] + ["queries"]
    device_map = {name: "disk" if name in ("text_encoder", "unet", "caption_head") else "cpu" for name in names}
    device_map = device_map if parts == "some" else {"": "disk"}
    model = type(tiny_model).from_pretrained(tiny_repo, device_map=device_map, offload_folder=tmp_path)
    assert all(parameter.is_meta for parameter in model.unet.parameters())
    assert model.queries.is_meta == (parts == "all")
    assert_answers_as(model, tiny_model, pixel_values, captions)


@torch.no_grad()
@no_offload_in_5_0
def test_weights_can_be_offloaded_to_memory(tiny_model, pixel_values, captions):
    model = accelerate.cpu_offload(copy.deepcopy(tiny_model), execution_device=torch.device("cpu"))
    assert model.queries.is_meta
    assert_answers_as(model, tiny_model, pixel_values, captions)


@no_offload_in_5_0
def test_commands_take_a_model_that_is_offloaded(tiny_model, pixel_values):
    model = accelerate.cpu_offload(copy.deepcopy(tiny_model), execution_device=torch.device("cpu"))
    processor, decoding = tiny.processor(), Decoding(max_new_tokens=5, prefix="A")
    captions, expected = (
        Captioner(each, processor, decoding)("abc", list(pixel_values)) for each in (model, tiny_model)
    )
    assert captions == expected
    seen = [(number, see(processor, image)) for number, image in enumerate(tiny.images(2))]
    for _, _, rebuilt in reconstruct_images(model, seen, num_inference_steps=1):
        assert rebuilt.size == (32, 32)


@pytest.mark.slow
def test_no_device_is_named_by_accident():
    script = ROOT / "tests" / "on_pretended_device.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
