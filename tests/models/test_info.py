"""`vlv info` and its counts, compared with the libraries' own classes."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, Florence2Model, Qwen2ForCausalLM

from modeling_vlv import VLVModel
from vlv.cli import main
from vlv.models.info import count_parts
from vlv.models.published import published_config


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def grouped(config):
    counts = {}
    for part in count_parts(config):
        name = part.name.split(".")[0]
        counts[name] = counts.get(name, 0) + part.parameters
    return counts


@pytest.mark.parametrize(
    "caption_head, parameters",
    [
        ("0.5B", 494_032_768),
        pytest.param("1.5B", 1_543_714_304, marks=pytest.mark.slow),
        pytest.param("3B", 3_085_938_688, marks=pytest.mark.slow),
    ],
)
def test_the_published_sizes(caption_head, parameters):
    config = published_config(caption_head)
    counts = grouped(config)
    with torch.device("meta"):
        florence = Florence2Model(config.encoder_config)
        florence.tie_weights()
        assert counts["encoder"] == count(florence)
        assert counts["text_encoder"] == count(CLIPTextModel(config.text_encoder_config)) == 340_387_840
        assert counts["unet"] == count(UNet2DConditionModel(**config.decoder_config["unet"])) == 865_910_724
        assert counts["vae"] == count(AutoencoderKL(**config.decoder_config["vae"])) == 83_653_863
        llm = Qwen2ForCausalLM(config.caption_config)
        llm.tie_weights()
        assert counts["caption_head"] == count(llm) == parameters
    width = config.caption_config.hidden_size
    assert counts["queries"] == 77 * 1024
    assert counts["projection"] == 2 * (1024 * 1024 + 1024)
    assert counts["prefix_projection"] == 1024 * width + width + width * width + width


def test_bytes_and_total(tiny_config, tiny_model):
    parts = count_parts(tiny_config, (torch.float32, torch.float16))
    assert sum(part.parameters for part in parts) == count(tiny_model)
    for part in parts:
        assert part.bytes == {torch.float32: 4 * part.parameters, torch.float16: 2 * part.parameters}


def test_the_command(tiny_repo, tiny_model, capsys):
    for source in (tiny_repo, tiny_repo / "config.json"):
        assert main(["info", str(source)]) == 0
        *_, total = capsys.readouterr().out.splitlines()
        assert total.split()[:2] == ["total", f"{count(tiny_model):,}"]


def test_the_command_needs_no_weights(tmp_path, monkeypatch, capsys):
    published_config().save_pretrained(tmp_path)
    monkeypatch.setattr(VLVModel, "from_pretrained", None)
    assert main(["info", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert (
        "caption_head" in output and "3,085,938,688" in output and "12,343.8 MB" in output and "6,171.9 MB" in output
    )


def test_no_model(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "bart"}')
    for source, complaint in ((tmp_path / "nowhere", "There is no file or folder"), (tmp_path, "is not a VLV")):
        assert main(["info", str(source)]) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert complaint in error
