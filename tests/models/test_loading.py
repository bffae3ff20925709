"""Loading models for the commands, and the errors for models that cannot be loaded."""

import json
import os
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BertConfig

from modeling_vlv import VLVForConditionalGeneration, VLVModel
from vlv.models.loading import load_autoencoder, load_captioner


@pytest.fixture
def repo(tiny_repo, tmp_path):
    """A copy of `tiny_repo` that a test may damage."""
    return shutil.copytree(tiny_repo, tmp_path / "repo")


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_captioner_has_no_decoder_and_is_fp32_on_cpu(stored, tiny_model, tiny_processor, tmp_path):
    tiny.model().to(stored).save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    model, _ = load_captioner(str(tmp_path), "cpu")
    assert type(model) is VLVForConditionalGeneration
    assert model.unet is None and model.vae is None
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    expected = tiny_model.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name].to(stored).float(), rtol=0, atol=0)


def test_autoencoder_has_everything(tiny_repo, tiny_model):
    model, processor = load_autoencoder(str(tiny_repo), "cpu")
    assert type(model) is VLVModel
    assert model.state_dict().keys() == tiny_model.state_dict().keys()
    assert processor(images=tiny.images(1))["pixel_values"].shape == (1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)


def test_code_beside_the_weights_is_never_run(repo):
    for path in repo.glob("*.py"):
        path.write_text("raise SystemExit('code of the checkpoint was run')")
    load_captioner(str(repo), "cpu")
    load_autoencoder(str(repo), "cpu")


def test_rebuilding_needs_no_caption_head(tiny_repo):
    model, _ = load_autoencoder(str(tiny_repo), "cpu", caption_config=None)
    assert model.caption_head is None and model.prefix_projection is None


@pytest.mark.parametrize("config", [{}, {"caption_config": None}], ids=str)
def test_loading_is_quiet(config, tiny_repo, capfd):
    load_autoencoder(str(tiny_repo), "cpu", **config)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_missing_parts(tmp_path):
    VLVModel(tiny.config(caption_config=None)).save_pretrained(tmp_path / "no_head")
    with pytest.raises(ValueError, match="no_head has no caption head"):
        load_captioner(str(tmp_path / "no_head"))
    VLVModel(tiny.config(decoder_config=None)).save_pretrained(tmp_path / "no_decoder")
    with pytest.raises(ValueError, match="no_decoder has no diffusion decoder"):
        load_autoencoder(str(tmp_path / "no_decoder"))


def test_missing_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file or folder .*nowhere"):
        load_captioner(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="There is no folder someone/something, and no model"):
        load_captioner("someone/something")
    with pytest.raises(FileNotFoundError, match="There is no folder nowhere. A model on the Hub is named user/name"):
        load_captioner("nowhere")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_captioner(str(tmp_path))


def test_model_of_another_kind(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a VLV checkpoint.*'bert'"):
        load_captioner(str(tmp_path))


def test_truncated_weights(repo):
    weights = repo / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="weights of .* cannot be read"):
        load_captioner(str(repo), "cpu")


def test_missing_weights_are_an_error_not_random_numbers(repo):
    weights = load_file(repo / "model.safetensors")
    del weights["projection.0.weight"]
    save_file(weights, repo / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of the weights.*projection.0.weight"):
        load_captioner(str(repo), "cpu")


def test_config_that_contradicts_the_weights(repo):
    config = json.loads((repo / "config.json").read_text())
    config["num_queries"] -= 1
    (repo / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"queries is \(10, \d+\) in its weights, but \(9, \d+\) by its config"):
        load_captioner(str(repo), "cpu")


class Malice:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_pickle_is_not_opened(repo, monkeypatch):
    monkeypatch.chdir(repo)
    (repo / "model.safetensors").unlink()
    torch.save({"queries": Malice()}, repo / "pytorch_model.bin")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        load_captioner(str(repo), "cpu")
    assert not (repo / "owned").exists()


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_unusable_device(device, tiny_repo):
    with pytest.raises(ValueError, match=f"--device {device} cannot be used here"):
        load_captioner(str(tiny_repo), device)


def test_same_captions_as_through_the_auto_classes(tiny_repo, tiny_processor):
    model, processor = load_captioner(str(tiny_repo), "cpu")
    loaded = AutoModelForImageTextToText.from_pretrained(tiny_repo, trust_remote_code=True)
    inputs = processor(images=tiny.images(2))
    expected = loaded.generate(**tiny_processor(images=tiny.images(2)), max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), expected)
