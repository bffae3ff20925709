"""The config: saving and loading it, settings that it refuses, and inputs that the model refuses."""

import copy
import json

import pytest
import tiny
import torch
from transformers import CLIPTextConfig, Florence2Config, Qwen2Config

from configuration_vlv import AUTO_MAP, CUSTOM_PIPELINES, VLVConfig

# ---- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decoder_config": None},
        {"caption_config": None},
        {"num_queries": 3, "image_size": 64, "min_snr_gamma": 5.0},
    ],
    ids=["whole", "no decoder", "no caption head", "settings"],
)
def test_a_config_survives_its_file_unchanged(tmp_path, settings):
    config = tiny.config(**settings)
    config.save_pretrained(tmp_path)
    loaded = VLVConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == {**config.to_dict(), "transformers_version": loaded.to_dict()["transformers_version"]}
    written = (tmp_path / "config.json").read_text()
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == written


def test_sub_configs_are_real_config_objects():
    loaded = VLVConfig(**json.loads(tiny.config().to_json_string(use_diff=False)))
    assert isinstance(loaded.encoder_config, Florence2Config)
    assert isinstance(loaded.text_encoder_config, CLIPTextConfig)
    assert isinstance(loaded.caption_config, Qwen2Config)
    assert type(loaded.decoder_config) is dict and type(loaded.decoder_config["unet"]) is dict
    assert loaded.get_text_config(decoder=True) is loaded.caption_config


def test_diffusers_frozen_dicts_are_accepted(tiny_model):
    parts = {
        "unet": tiny_model.unet.config,
        "vae": tiny_model.vae.config,
        "scheduler": tiny_model.teacher.schedule.config,
    }
    config = tiny.config(decoder_config=parts)
    assert type(config.decoder_config["unet"]) is dict
    assert json.loads(config.to_json_string())["decoder_config"]["unet"]["sample_size"] == 8


def test_a_saved_config_names_the_repos_code_and_pipelines(tmp_path):
    tiny.config(auto_map={"AutoConfig": "elsewhere--old.Config"}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP
    assert saved["custom_pipelines"].keys() == CUSTOM_PIPELINES.keys()
    assert saved["model_type"] == "vlv"


def test_the_caller_keeps_the_config(tiny_config):
    before = tiny_config.to_dict()
    parts = copy.deepcopy(before["decoder_config"])
    VLVConfig(**{**before, "decoder_config": parts})
    assert tiny_config.to_dict() == before and parts == before["decoder_config"]


def test_a_config_needs_no_arguments():
    """The library makes one to find the settings that differ from the defaults."""
    assert VLVConfig().num_queries == 77


# ---- parts that do not fit together ------------------------------------------------------------------------


def unet(**settings):
    parts = tiny.decoder_config()
    return {**parts, "unet": {**parts["unet"], **settings}}


def scheduler(**settings):
    parts = tiny.decoder_config()
    return {**parts, "scheduler": {**parts["scheduler"], **settings}}


def wide_encoder():
    encoder = tiny.encoder_config().to_dict()
    return {**encoder, "text_config": {**encoder["text_config"], "d_model": 64}}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_queries": 13}, "num_queries is 13, but the text encoder has 12 positions: choose between 1 and 12"),
        ({"num_queries": 0}, "num_queries is 0"),
        ({"denoising_loss": "huber"}, "denoising_loss is 'huber': choose 'mse' or 'l1'"),
        ({"decoder_config": unet(cross_attention_dim=32)}, "text encoder is 24 wide.*UNet.* of width 32"),
        ({"decoder_config": unet(in_channels=9)}, "latents have 4 channels, but the UNet reads 9"),
        ({"encoder_config": wide_encoder()}, "image tokens are 32 wide, but its language model is 64 wide"),
        ({"decoder_config": {"unet": {}}}, "decoder_config lacks scheduler, vae"),
        ({"decoder_config": scheduler(prediction_type="sample")}, "predicts 'sample'.*epsilon or v_prediction"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_both_sizes(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny.config(**settings)


def test_an_empty_prompt_shorter_than_the_queries_is_refused(tiny_model):
    model = copy.deepcopy(tiny_model)
    model.config.empty_prompt_ids = model.config.empty_prompt_ids[:4]
    with pytest.raises(ValueError, match="empty_prompt_ids holds 4 ids, but the context is 10 long"):
        model.empty_context()


# ---- inputs that the model refuses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixel_values", "sentence"),
    [
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\).*expected floats of shape \(batch, 3, height, width\)"),
        (torch.zeros(2, 4, 32, 32), r"\(2, 4, 32, 32\)"),
        (torch.zeros(2, 32, 32, 3), r"\(2, 32, 32, 3\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "torch.uint8.*expected floats"),
        (torch.full((2, 3, 32, 32), 255.0), "not normalised.*take them from the processor"),
        (torch.full((2, 3, 32, 32), torch.nan), "not finite"),
        (torch.zeros(2, 3, 128, 32), "128x32 pixels, but the encoder has positions for 64.*processor"),
        (torch.zeros(0, 3, 32, 32), r"\(0, 3, 32, 32\)"),
        (None, "give pixel_values, image_features or caption_embeds"),
        ([[0.0]], "pixel_values are a list: expected a tensor from the processor"),
    ],
    ids=lambda value: None if isinstance(value, torch.Tensor) else value,
)
def test_wrong_pixels_are_refused(tiny_model, pixel_values, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_model.encode(pixel_values)


@pytest.mark.parametrize(
    ("decoder_pixel_values", "sentence"),
    [
        (torch.zeros(3, 32, 32), r"decoder_pixel_values are \(3, 32, 32\).*return_decoder_pixel_values=True"),
        (torch.zeros(1, 4, 32, 32), r"decoder_pixel_values are \(1, 4, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "torch.int64"),
        (torch.full((1, 3, 32, 32), 2.0), "not in -1..1: use processor"),
        (torch.full((1, 3, 32, 32), torch.nan), "not in -1..1: use processor"),
    ],
    ids=lambda value: None if isinstance(value, torch.Tensor) else value,
)
def test_wrong_decoder_pixels_are_refused(tiny_model, decoder_pixel_values, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_model.encode_latents(decoder_pixel_values)


@pytest.mark.parametrize("shape", [(10, 24), (1, 10, 32), (1, 13, 24)])
def test_wrong_caption_embeds_are_refused(tiny_model, shape):
    with pytest.raises(ValueError, match=r"expected \(batch, queries, 24\) with at most 12 queries"):
        tiny_model.generate(caption_embeds=torch.randn(*shape))


@pytest.mark.parametrize(
    "name", ["input_ids", "attention_mask", "labels", "decoder_pixel_values", "latents", "noise", "timesteps"]
)
def test_each_image_needs_its_own_row_of_everything(tiny_model, name):
    latents, ids = torch.zeros(2, 4, 8, 8), torch.ones(2, 3, dtype=torch.long)
    inputs = {"pixel_values": torch.zeros(2, 3, 32, 32), "latents": latents, "input_ids": ids}
    rows = {"decoder_pixel_values": latents, "latents": latents, "noise": latents, "timesteps": torch.tensor([1, 2])}
    row = rows.get(name, ids)[:1]
    with pytest.raises(ValueError, match=f"There are 2 images, but 1 rows of {name}: each image needs its own"):
        tiny_model(**{**inputs, name: row})


def test_a_beginning_for_another_number_of_images_is_refused(tiny_model):
    with pytest.raises(ValueError, match="There are 1 images, but 2 rows of input_ids"):
        tiny_model.generate(torch.zeros(1, 3, 32, 32), input_ids=torch.ones(2, 3, dtype=torch.long))
