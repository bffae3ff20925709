"""
The model on a second device, which is only pretended. `test_model_devices.py` runs this file in a separate process,
because torch cannot unregister a device.

The tensors of the device keep their data on the CPU, but an operation on them together with a CPU tensor is an error,
as it is on an accelerator.
"""

import accelerate
import pytest
import tiny
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.models.rebuilding import reconstruct_images, see

_setup_privateuseone_for_python_backend("pretended")
DEVICE = torch.device("pretended:0")
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Elsewhere(torch.Tensor):
    """A tensor of the pretended device."""

    @staticmethod
    def __new__(cls, data, requires_grad=False):
        if isinstance(data, Elsewhere) or data.is_meta:  # accelerate loads and offloads weights in this way
            return torch.nn.Parameter(data, requires_grad)
        layout = {"strides": data.stride(), "storage_offset": data.storage_offset()}
        elsewhere = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, device=DEVICE, **layout)
        elsewhere.data_on_cpu = data
        return elsewhere

    def tolist(self):  # torch refuses this for subclasses
        return self.data_on_cpu.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


class PretendedDevice(TorchDispatchMode):
    """In this mode, tensors can be made on the device, and every operation checks the devices of its tensors."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


def run(operation, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    result_is_elsewhere = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    if operation in MOVES:
        result_is_elsewhere = isinstance(args[0], Elsewhere)
    elif result_is_elsewhere and any(tensor.ndim and not isinstance(tensor, Elsewhere) for tensor in tensors):
        raise RuntimeError(f"{operation} got tensors of two devices")
    if kwargs.get("device") is not None:
        result_is_elsewhere = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")} if result_is_elsewhere else kwargs
    args, kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.data_on_cpu, (args, kwargs))
    result = operation(*args, **kwargs)
    return tree_map_only(torch.Tensor, Elsewhere, result) if result_is_elsewhere else result


@pytest.fixture(autouse=True)
def _pretended_device(monkeypatch):
    # Tensors that are made in inference mode cannot be wrapped.
    monkeypatch.setattr(torch._C, "_InferenceMode", lambda mode: torch.no_grad())
    torch._C._set_only_lift_cpu_tensors(
        True
    )  # torch.tensor(..., device=DEVICE) first makes a CPU tensor, then moves it
    with PretendedDevice():
        yield


@pytest.fixture
def model():
    model = tiny.model(sample_latents=False).to(DEVICE)
    assert {parameter.device for parameter in model.parameters()} == {DEVICE}
    return model


@pytest.fixture
def pictures():
    pixel_values, decoder_pixel_values = tiny.pixels(3)
    return {"pixel_values": pixel_values, "decoder_pixel_values": decoder_pixel_values}


@pytest.fixture
def captions():
    return dict(tiny.processor()(text=["a cat", "two small dogs", "sky"], return_labels=True))


def assert_same(elsewhere, here):
    assert elsewhere.device == DEVICE
    torch.testing.assert_close(elsewhere.detach().cpu(), here.detach())


def test_a_cpu_tensor_is_an_error_here(model):
    with pytest.raises(RuntimeError, match="two devices"):
        model.projection(torch.randn(1, 10, 32))


@torch.no_grad()
def test_encode(model, pictures):
    expected = tiny.model().encode(pictures["pixel_values"])
    assert_same(model.encode(pictures["pixel_values"].to(DEVICE)), expected)
    assert_same(model.encode(pictures["pixel_values"]), expected)  # pixels are moved to the model
    features = tiny.model().get_image_features(pictures["pixel_values"])
    assert_same(model.encode(image_features=features), expected)


@pytest.mark.parametrize("place", [DEVICE, torch.device("cpu")], ids=["inputs there", "inputs on the CPU"])
@pytest.mark.parametrize("settings", [{}, {"min_snr_gamma": 5.0, "context_dropout": 0.5}], ids=["plain", "options"])
def test_both_losses_and_their_gradients(model, pictures, captions, place, settings):
    fixed = {"noise": torch.randn(3, 4, 8, 8), "timesteps": torch.tensor([10, 500, 900])}
    losses, gradients = {}, {}
    for device, each in {"cpu": tiny.model(sample_latents=False), "pretended": model}.items():
        each.config.min_snr_gamma = settings.get("min_snr_gamma")
        inputs = {**pictures, **fixed, **captions}
        if device == "pretended":
            inputs = {name: tensor.to(place) for name, tensor in inputs.items()}
        each.set_stage("frozen", train=["queries", "projection", "prefix_projection", "caption_head"])
        losses[device] = each(**inputs, num_items_in_batch=captions["attention_mask"].sum()).loss
        losses[device].backward()
        gradients[device] = {name: each.get_parameter(name).grad for name in ("queries", "projection.0.weight")}
    assert_same(losses["pretended"], losses["cpu"])
    for name, gradient in gradients["pretended"].items():
        assert_same(gradient, gradients["cpu"][name])
    model.config.context_dropout = settings.get("context_dropout", 0.0)
    model.train()(**pictures).loss.backward()  # noise and timesteps are drawn on the device of the latents


def test_generate(model, pictures):
    beginning = dict(tiny.processor()(text=["a", "two small", ""]))
    expected = tiny.model().generate(pictures["pixel_values"], **beginning, max_new_tokens=5, do_sample=False)
    for place in (DEVICE, torch.device("cpu")):
        inputs = {name: ids.to(place) for name, ids in beginning.items()}
        assert_same(model.generate(pictures["pixel_values"], **inputs, max_new_tokens=5, do_sample=False), expected)
    beams = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    assert model.generate(pictures["pixel_values"], **beams).device == DEVICE


def test_reconstruct(model, pictures):
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    seeded = [torch.Generator().manual_seed(seed) for seed in range(3)]
    expected = tiny.model().reconstruct(pictures["pixel_values"], generator=seeded, **arguments)
    seeded = [torch.Generator().manual_seed(seed) for seed in range(3)]
    assert_same(model.reconstruct(pictures["pixel_values"], generator=seeded, **arguments), expected)


@torch.no_grad()
@pytest.mark.skipif(
    transformers.__version__.startswith("5.0."), reason="transformers 5.0 cannot offload its own models"
)
def test_a_model_whose_weights_stay_on_the_cpu_until_they_are_used(pictures, captions):
    fixed = {"noise": torch.ones(3, 4, 8, 8), "timesteps": torch.tensor([10, 500, 900])}
    expected = tiny.model(sample_latents=False)(**pictures, **captions, **fixed).loss
    model = accelerate.cpu_offload(tiny.model(sample_latents=False), execution_device=DEVICE)
    torch.testing.assert_close(model(**pictures, **captions, **fixed).loss.cpu(), expected)
    ids = model.generate(pictures["pixel_values"], max_new_tokens=3, do_sample=False)
    expected = tiny.model().generate(pictures["pixel_values"], max_new_tokens=3, do_sample=False)
    assert torch.equal(ids.cpu(), expected)
    assert len(model.reconstruct(pictures["pixel_values"], num_inference_steps=1)) == 3


@pytest.mark.parametrize(
    "decoding",
    [
        {},
        {"num_beams": 2},
        {"temperature": 1.0, "top_p": 0.9, "num_captions": 2},
        {"prefix": "A", "force_words": ["cat"], "ban_words": ["dog"], "repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 2},
    ],
    ids=str,
)
def test_the_caption_commands_captioner(model, pictures, decoding):
    names = ["a.png", "b.png", "c.png"]
    decoding = Decoding(max_new_tokens=6, **decoding)
    processor = tiny.processor()
    here = Captioner(tiny.model(), processor, decoding)(names, list(pictures["pixel_values"]))
    assert Captioner(model, processor, decoding)(names, list(pictures["pixel_values"])) == here


def test_the_reconstruct_commands_images(model):
    seen = [(number, see(tiny.processor(), image)) for number, image in enumerate(tiny.images(2))]
    rebuilt = list(reconstruct_images(model, seen, num_inference_steps=1))
    assert [key for key, _, _ in rebuilt] == [0, 1]
