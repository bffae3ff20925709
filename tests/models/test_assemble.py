"""`VLVModel.from_components` and `vlv assemble`: a VLV from pretrained parts."""

import json
import os
import re
import shutil

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from hub_server import READ_TOKEN
from paths import FIXTURES
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    Florence2ForConditionalGeneration,
    Florence2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from components_vlv import load_florence_config
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.cli import main

PARITY = FIXTURES / "parity"


def assemble(components, **kwargs):
    arguments = {name: str(components / name) for name in ("encoder", "decoder", "caption_head")}
    return VLVModel.from_components(**{**arguments, **kwargs}).eval()


def test_every_weight_is_that_of_its_part(tiny_components):
    model = assemble(tiny_components)
    florence = Florence2ForConditionalGeneration.from_pretrained(tiny_components / "encoder").model
    llm = AutoModelForCausalLM.from_pretrained(tiny_components / "caption_head")
    unet = load_file(tiny_components / "decoder" / "unet" / "diffusion_pytorch_model.safetensors")
    for part, expected in ((model.encoder, florence.state_dict()), (model.caption_head, llm.state_dict())):
        assert part.state_dict().keys() == expected.keys()
        for name, weight in part.state_dict().items():
            assert torch.equal(weight, expected[name]), name
    for name, weight in model.unet.state_dict().items():
        assert torch.equal(weight, unet[name]), name
    assert 0.01 < model.queries.std() < 0.03 and not model.queries.isnan().any()
    assert model.caption_head.lm_head.weight is model.caption_head.get_input_embeddings().weight
    assert not any(weight.requires_grad for weight in model.unet.parameters())


def test_caption_embeds_start_around_the_mean_of_the_word_embeddings(tiny_components):
    model = assemble(tiny_components, projection_start="mean")
    words = model.text_encoder.embeddings.token_embedding.weight
    torch.testing.assert_close(model.projection[2].bias, words.mean(0))
    plain = assemble(tiny_components)
    assert not plain.projection[2].bias.any() and 0.01 < model.projection[2].weight.std() < 0.03
    with pytest.raises(ValueError, match="projection_start is 'words': choose 'zero' or 'mean'"):
        assemble(tiny_components, projection_start="words")


@pytest.mark.parametrize(("size", "near"), [(20, 16), (72, 64), (0, 8), (-8, 8)])
def test_the_encoder_reads_sizes_that_its_strides_and_positions_allow(tiny_components, size, near):
    parts = tiny_components / "encoder", tiny_components / "decoder"
    processor = VLVProcessor.from_components(*parts, encoder_image_size=48)
    pixel_values = processor(images=tiny.images(2))["pixel_values"]
    assert pixel_values.shape == (2, 3, 48, 48) and processor.decoder_image_size == 32
    sentence = (
        f"encoder_image_size is {size}, but the encoder reads multiples of 8 pixels, its strides, up to 64, which its"
        f" positions reach: choose one of them, such as {near}."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        VLVProcessor.from_components(*parts, encoder_image_size=size)


def llm_config(config_class, **settings):
    return config_class(
        vocab_size=261,
        hidden_size=20,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=10,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        **settings,
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "config_class, model_class",
    [(Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM), (LlamaConfig, LlamaForCausalLM)],
)
def test_any_language_model(tiny_components, tmp_path, config_class, model_class, tied):
    """Its captions are the text that the language model itself writes after the prefix."""
    llm = tiny.randomise(model_class(llm_config(config_class, tie_word_embeddings=tied)))
    llm.save_pretrained(tmp_path / "llm")
    tiny.caption_tokenizer().save_pretrained(tmp_path / "llm")
    model = assemble(tiny_components, caption_head=str(tmp_path / "llm"))
    tiny.randomise(model.prefix_projection)
    model.save_pretrained(tmp_path / "vlv")
    model = VLVModel.from_pretrained(tmp_path / "vlv")
    pixel_values, _ = tiny.pixels(2)
    with torch.no_grad():
        prefix = model.prefix_projection(model.encode_context(model.encode(pixel_values)))
    expected = llm.generate(inputs_embeds=prefix, attention_mask=torch.ones(2, 12), max_new_tokens=5)
    assert torch.equal(model.generate(pixel_values, max_new_tokens=5), expected)
    assert torch.equal(model.caption_head.lm_head.weight, llm.lm_head.weight)
    assert (model.caption_head.lm_head.weight is model.caption_head.get_input_embeddings().weight) == tied


# ---- Florence-2 in Microsoft's layout ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def microsofts(tmp_path_factory):
    """The Florence-2 of the reference's checkpoint, with the files that Microsoft's remote code saves."""
    folder = tmp_path_factory.mktemp("florence")
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "vocab.json"):
        shutil.copy(PARITY / "components" / "florence" / name, folder)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    checkpoint = torch.load(PARITY / "stage1_flat" / "pytorch_model.bin", weights_only=True)
    weights = {name.removeprefix("model."): t.clone() for name, t in checkpoint.items() if name.startswith("model.")}
    embeddings = weights["language_model.model.shared.weight"]
    weights["language_model.lm_head.weight"] = embeddings.clone()  # tied in Microsoft's code, a frozen copy here
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def components_of_the_reference(**kwargs):
    parts = {"decoder": str(PARITY / "components" / "sd"), "caption_head": str(PARITY / "components" / "qwen")}
    return VLVModel.from_components(**{**parts, **kwargs}).eval()


def test_microsofts_florence(microsofts):
    model = components_of_the_reference(encoder=str(microsofts))
    expected = load_file(PARITY / "stage1_expected.safetensors")
    with torch.no_grad():
        features = model.get_image_features(expected["florence.pixel_values"])
        answers = model.encoder.language_model.encoder(inputs_embeds=expected["florence.encoder_inputs_embeds"])
    torch.testing.assert_close(features, expected["florence.image_features"], atol=2e-5, rtol=0)
    torch.testing.assert_close(answers[0], expected["florence.encoder_last_hidden_state"], atol=2e-5, rtol=0)
    assert model.config.prompt_ids == expected["florence.input_ids"][0].tolist()
    # Its own table has 130 rows. The length in the config is wrong and is not used.
    assert model.config.encoder_config.text_config.max_position_embeddings == 128


@pytest.mark.parametrize("kept", ["lm_head", "model.shared", "model.encoder.embed_tokens"])
def test_microsofts_florence_in_safetensors(microsofts, tmp_path, kept):
    """A safetensors file holds one of the tied embeddings, and the positions in a config may be wrong."""
    shutil.copytree(microsofts, tmp_path, dirs_exist_ok=True)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    (tmp_path / "pytorch_model.bin").unlink()
    embeddings = weights["language_model.model.shared.weight"]
    for name in ("lm_head", "model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens"):
        weights.pop(f"language_model.{name}.weight")
    weights[f"language_model.{kept}.weight"] = embeddings
    save_file(weights, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1024
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = components_of_the_reference(encoder=str(tmp_path))
    language_model = model.encoder.language_model
    assert torch.equal(language_model.decoder.embed_tokens.weight, embeddings)
    assert language_model.encoder.embed_tokens.weight is language_model.shared.weight
    assert language_model.encoder.embed_positions.weight.shape == (130, 64)


@pytest.mark.parametrize(
    "width, layers, dims, billions",
    [(768, 6, [128, 256, 512, 1024], 0.23), (1024, 12, [256, 512, 1024, 2048], 0.77)],
    ids=["base", "large"],
)
def test_the_released_sizes_of_microsofts_florence(width, layers, dims, billions, tmp_path):
    """From a config in Microsoft's layout, the models have as many parameters as Microsoft states."""
    config = json.loads((PARITY / "components" / "florence" / "config.json").read_text())
    heads = [dim // 32 for dim in dims]
    config["vision_config"] |= {"dim_embed": dims, "num_heads": heads, "num_groups": heads, "depths": [1, 1, 9, 1]}
    config["vision_config"] |= {"projection_dim": width}
    config["text_config"] |= {"d_model": width, "vocab_size": 51289, "max_position_embeddings": 1024}
    config["text_config"] |= {"num_hidden_layers": layers}
    for half in ("encoder", "decoder"):
        config["text_config"] |= {f"{half}_layers": layers, f"{half}_attention_heads": width // 64}
        config["text_config"] |= {f"{half}_ffn_dim": 4 * width}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        florence = Florence2Model(load_florence_config(str(tmp_path)))
    florence.tie_weights()
    assert round(sum(weight.numel() for weight in florence.parameters()) / 1e9, 2) == billions


# ---- Stable Diffusion 1.x ----------------------------------------------------------------------------------


def test_stable_diffusion_1(tiny_components, tmp_path):
    """As in the released ones: 1x1 convolutions around the attention, quick GELU, .bin files, no scaling factor."""
    parts = tiny.decoder_config("epsilon")
    folder = shutil.copytree(tiny_components / "decoder", tmp_path / "sd")
    shutil.rmtree(folder / "text_encoder")
    clip = CLIPTextConfig(**{**tiny.text_encoder_config().to_dict(), "hidden_act": "quick_gelu"})
    clip = tiny.randomise(CLIPTextModel(clip), seed=1)
    torch.save(clip.state_dict(), (folder / "text_encoder").mkdir() or folder / "text_encoder" / "pytorch_model.bin")
    clip.config.save_pretrained(folder / "text_encoder")
    for name, part_class in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        shutil.rmtree(folder / name)
        tiny.randomise(part_class.from_config(parts[name])).save_pretrained(folder / name, safe_serialization=False)
    config = json.loads((folder / "vae" / "config.json").read_text())
    del config["scaling_factor"]
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True).save_pretrained(folder / "scheduler")
    model = assemble(tiny_components, decoder=str(folder))
    assert model.vae.config.scaling_factor == 0.18215
    assert model.config.decoder_config["scheduler"]["prediction_type"] == "epsilon"
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.text_encoder(ids), clip(ids).last_hidden_state)
    pixel_values, _ = tiny.pixels(1)
    assert model.reconstruct(pixel_values, num_inference_steps=2)[0].size == (32, 32)


# ---- how it is loaded --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dtype(microsofts):
    """By default every weight stays exact (here fp32, with a bf16 LLM). Otherwise all weights get the given dtype."""
    model = components_of_the_reference(encoder=str(microsofts))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    llm = load_file(PARITY / "components" / "qwen" / "model.safetensors")["model.norm.weight"]
    assert llm.dtype == torch.bfloat16 and torch.equal(model.caption_head.model.norm.weight, llm.float())
    for dtype in (torch.bfloat16, "bfloat16"):
        model = components_of_the_reference(encoder=str(microsofts), dtype=dtype)
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert model.config.dtype == torch.bfloat16


def test_device_map(tiny_components, tmp_path):
    """The map is for the whole model, as in `from_pretrained`. Here the UNet stays on disk until it is called."""
    names = ("encoder", "queries", "projection", "text_encoder", "vae", "prefix_projection", "caption_head")
    device_map = {"unet": "disk", **dict.fromkeys(names, "cpu")}
    model = assemble(tiny_components, device_map=device_map, offload_folder=str(tmp_path))
    assert model.hf_device_map == device_map
    assert all(weight.is_meta for weight in model.unet.parameters())
    pixel_values, _ = tiny.pixels(1)
    images = model.reconstruct(pixel_values, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    assert len(images) == 1


@pytest.mark.slow
def test_hub_ids_and_hub_arguments(tiny_components, hub, monkeypatch, tmp_path, capsys):
    """Private repos on a branch: revision and token are passed on, and without a network the cache is enough."""
    monkeypatch.delenv("HF_TOKEN")
    parts = {name: f"ada/{name}" for name in ("encoder", "decoder", "caption_head")}
    for name, repo_id in parts.items():
        hub.publish(repo_id, tiny_components / name, revision="v2", private=True)
    command = ["assemble", "--output", str(tmp_path / "vlv"), "--revision", "v2"]
    command += [argument for name, repo_id in parts.items() for argument in (f"--{name}", repo_id)]
    assert main(command) == 2
    assert "cannot be read from ada/encoder" in capsys.readouterr().err
    assert main([*command, "--token", READ_TOKEN]) == 0
    model = VLVModel.from_pretrained(tmp_path / "vlv")
    expected = assemble(tiny_components)
    for part in ("encoder", "text_encoder", "unet", "vae", "caption_head"):
        weights = getattr(model, part).state_dict()
        for name, weight in getattr(expected, part).state_dict().items():
            assert torch.equal(weights[name], weight), f"{part}.{name}"
    # The sources of the parts are recorded for the model card.
    assert model.config.encoder_config._name_or_path == "ada/encoder"
    assert model.config.text_encoder_config._name_or_path == "ada/decoder"
    assert {part["_name_or_path"] for part in model.config.decoder_config.values()} == {"ada/decoder"}
    assert model.config.caption_config._name_or_path == "ada/caption_head"

    asked = []
    hub.fail = lambda method, path: asked.append(path) or True
    command[2] = str(tmp_path / "again")
    assert main([*command, "--local_files_only"]) == 0
    assert not asked
    assert VLVProcessor.from_pretrained(tmp_path / "again").tokenizer("red").input_ids


# ---- the command -------------------------------------------------------------------------------------------


def test_the_command_writes_a_complete_repo(tiny_components, tmp_path):
    folder = tmp_path / "vlv"
    command = ["assemble", "--output", str(folder), "--num-queries", "5", "--image-size", "64", "--crop", "center"]
    for name in ("encoder", "decoder", "caption-head"):
        command += [f"--{name}", str(tiny_components / name.replace("-", "_"))]
    assert main([*command, "--dtype", "bfloat16"]) == 0
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert (model.dtype, model.config.num_queries, processor.crop) == (torch.bfloat16, 5, "center")
    inputs = processor(images=tiny.images(2))
    assert len(processor.batch_decode(model.generate(**inputs, max_new_tokens=3))) == 2
    assert model.reconstruct(**inputs, num_inference_steps=1)[0].size == (64, 64)
    assert main(command) == 2  # the output is not overwritten
    assert [path.name for path in tmp_path.iterdir()] == ["vlv"]


# ---- what does not fit -------------------------------------------------------------------------------------


def spoil(components, tmp_path, file, **changes):
    shutil.copytree(components, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**config, **changes}))
    return tmp_path


def test_a_missing_folder(tiny_components, tmp_path):
    for name, part in (("encoder", "encoder"), ("decoder", "decoder"), ("caption_head", "caption head")):
        with pytest.raises(OSError, match=f"The {part} cannot be read from .*/nowhere: there is no such folder"):
            assemble(tiny_components, **{name: str(tmp_path / "nowhere")})


def test_an_id_without_network(tiny_components):
    with pytest.raises(OSError, match="The encoder cannot be read from nobody/nothing: there is no such folder"):
        assemble(tiny_components, encoder="nobody/nothing")


def test_another_architecture_as_encoder(tiny_components, tmp_path):
    parts = spoil(tiny_components, tmp_path, "encoder/config.json", model_type="bart")
    with pytest.raises(ValueError, match="not a Florence-2: its config.json names the model type 'bart'"):
        assemble(parts)


def test_a_context_that_the_unet_cannot_read(tiny_components, tmp_path):
    tiny.CLIPTextModel(
        tiny.CLIPTextConfig(**{**tiny.text_encoder_config().to_dict(), "hidden_size": 48})
    ).save_pretrained(shutil.copytree(tiny_components / "decoder", tmp_path / "decoder") / "text_encoder")
    with pytest.raises(ValueError, match="48 wide, but the UNet attends to a context of width 24"):
        assemble(tiny_components, decoder=str(tmp_path / "decoder"))


def test_more_queries_than_positions(tiny_components):
    with pytest.raises(ValueError, match="num_queries is 13, but the text encoder has 12 positions"):
        assemble(tiny_components, num_queries=13)


def test_a_truncated_file(tiny_components, tmp_path):
    shutil.copytree(tiny_components, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="The encoder cannot be read from .*/encoder: "):
        assemble(tmp_path)


PARTS = ["encoder", "decoder/text_encoder", "decoder/unet", "decoder/vae", "caption_head"]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_lacks_a_weight(part, tiny_components, tmp_path):
    """The libraries would continue with random numbers instead of the weight."""
    shutil.copytree(tiny_components, tmp_path, dirs_exist_ok=True)
    (file,) = (tmp_path / part).glob("*.safetensors")
    weights = load_file(file)
    left_out = next(name for name in weights if name.endswith("bias"))
    save_file({name: weight for name, weight in weights.items() if name != left_out}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 of its weights, such as .*{left_out.rpartition('model.')[2]}"):
        assemble(tmp_path)


@pytest.mark.parametrize("part", PARTS)
def test_a_config_that_contradicts_the_weights(part, tiny_components, tmp_path):
    changes = {
        "encoder": {"vision_config": {**tiny.encoder_config().vision_config.to_dict(), "embed_dim": [16, 64]}},
        "decoder/text_encoder": {"intermediate_size": 40},
        "decoder/unet": {"block_out_channels": [16, 40]},
        "decoder/vae": {"block_out_channels": [8, 8, 12]},
        "caption_head": {"intermediate_size": 60},
    }
    name = part.partition("/")[0].replace("_", " ")
    with pytest.raises(ValueError, match=f"The {name} cannot be read from .*") as error:
        assemble(spoil(tiny_components, tmp_path, f"{part}/config.json", **changes[part]))
    assert "\n" not in str(error.value)


class Malice:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("part", PARTS)
def test_a_pickle_with_code_is_not_run(part, tiny_components, microsofts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_components, tmp_path / "parts")
    if part == "encoder":
        shutil.rmtree(tmp_path / "parts" / part)
        shutil.copytree(microsofts, tmp_path / "parts" / part)
    for file in (tmp_path / "parts" / part).glob("*.safetensors"):
        file.unlink()
    name = "diffusion_pytorch_model.bin" if part in ("decoder/unet", "decoder/vae") else "pytorch_model.bin"
    torch.save({"weight": Malice()}, tmp_path / "parts" / part / name)
    with pytest.raises((OSError, ValueError), match="cannot be read from"):
        assemble(tmp_path / "parts")
    assert not (tmp_path / "owned").exists()


def test_microsofts_florence_that_lacks_a_weight(microsofts, tmp_path):
    shutil.copytree(microsofts, tmp_path, dirs_exist_ok=True)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    for left_out in ("vision_tower.convs.0.proj.bias", "image_projection"):
        torch.save({name: t for name, t in weights.items() if name != left_out}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="The encoder cannot be read from .*: it lacks "):
            components_of_the_reference(encoder=str(tmp_path))


def test_the_command_fails_in_one_line_and_writes_nothing(tiny_components, tmp_path, capsys):
    parts = {"encoder": str(tmp_path), "decoder": str(tiny_components / "decoder")}
    command = [argument for name, part in parts.items() for argument in (f"--{name}", part)]
    assert main(["assemble", *command, "--output", str(tmp_path / "output" / "vlv")]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"vlv assemble: error: The encoder cannot be read from {tmp_path}: ")
    assert not list((tmp_path / "output").glob("*"))
