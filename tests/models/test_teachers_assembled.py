"""`from_components`, `vlv assemble`, `vlv export` and `vlv info` with teachers of every family."""

import json
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import teachers
import tiny
import torch
from safetensors.torch import load_file
from teachers import every_family

from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.cli import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline's folder of each family, made once."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = teachers.save_pipeline(family, tmp_path_factory.mktemp("teacher"))
        return made[family]

    return get


def assemble(components, folder, **settings):
    parts = {"encoder": str(components / "encoder"), "decoder": str(folder)}
    return VLVModel.from_components(**parts, image_size=32, **settings).eval()


def what_the_pipeline_reads(family, folder):
    """The unconditional context (L, E) and pooled vector that the pipeline gives its denoiser, asked with words."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer

    def watch(module, positional, named):
        context = named.get("encoder_hidden_states")
        if context is None:
            context = positional[2]  # Z-Image's list
        mask = named.get("encoder_attention_mask", named.get("encoder_hidden_states_mask"))
        pooled = named.get("pooled_projections", named.get("added_cond_kwargs", {}).get("text_embeds"))
        seen.append((context, mask, pooled))

    denoiser.register_forward_pre_hook(watch, with_kwargs=True)
    call = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "latent", "guidance_scale": 3.0}
    if family in ("Sana", "PixArt-Sigma"):
        call["use_resolution_binning"] = False
    if family == "Sana":
        call["complex_human_instruction"] = None
    if family == "Qwen-Image":
        call |= {"true_cfg_scale": 3.0, "negative_prompt": "", "guidance_scale": None}
    pipeline(prompt="a cat", **call)
    if family in ("Lumina2", "FLUX.2 klein", "Qwen-Image"):
        (_, (context, mask, pooled)) = seen  # it asks with the prompt, then without
        context, mask = context[0], None if mask is None else mask[0]
    else:
        ((context, mask, pooled),) = seen  # it asks with both at once
        if family == "Z-Image":
            return context[1], None
        context, mask = context[0], None if mask is None else mask[0]
        pooled = None if pooled is None else pooled[:1]
    return context if mask is None else context[mask.bool()], pooled


@every_family
def test_from_components(family, folders, tiny_components):
    """Each weight is its pipeline's, and so is the empty prompt."""
    folder = folders(family)
    model = assemble(tiny_components, folder)
    for part in (model.teacher.denoiser, "vae"):
        saved = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        for name, weight in getattr(model, part).state_dict().items():
            assert torch.equal(weight, saved[name]), name
    if model.config.text_encoder_config is not None:
        assert not model.empty_buffers
        return
    assert model.text_encoder is None and model.config.num_queries == 77
    context, pooled = what_the_pipeline_reads(family, folder)
    torch.testing.assert_close(model.empty_prompt_embeds[0], context[:77], rtol=1e-4, atol=1e-5)
    if pooled is not None:
        torch.testing.assert_close(model.empty_pooled_embeds, pooled, rtol=1e-4, atol=1e-5)
    few = assemble(tiny_components, folder, num_queries=3)
    assert torch.equal(few.empty_prompt_embeds, model.empty_prompt_embeds[:, :3])
    pixel_values, decoder_pixel_values = tiny.pixels(2)
    with torch.no_grad():
        assert few(pixel_values=pixel_values, decoder_pixel_values=decoder_pixel_values).loss.isfinite()
    assert few.reconstruct(pixel_values, num_inference_steps=1)[0].size == (32, 32)


@every_family
def test_export_is_a_pipeline_that_diffusers_loads(family, folders, tiny_components, tmp_path):
    """It draws the same."""
    parts = {"encoder": str(tiny_components / "encoder"), "decoder": str(folders(family)), "image_size": 32}
    model = VLVModel.from_components(**parts, num_queries=5).eval()
    model.save_pretrained(tmp_path / "vlv")
    VLVProcessor.from_components(**parts).save_pretrained(tmp_path / "vlv")
    assert main(["export", str(tmp_path / "vlv"), "--output", str(tmp_path / "parts")]) == 0
    decoder = tmp_path / "parts" / "decoder"
    index = json.loads((decoder / "model_index.json").read_text())
    optional = getattr(diffusers, model.teacher.pipeline)._optional_components
    absent = {name: None for name, kind in index.items() if kind == [None, None] and name not in optional}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(decoder, **absent)
    assert type(pipeline).__name__ == model.teacher.pipeline
    pipeline.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 5, model.config.caption_embeds_width, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 2, "height": 32, "width": 32}
    drawn = pipeline(
        **model.prompt(caption_embeds=embeds),
        **model.teacher.guidance(2.0),
        **call,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images
    expected = model.reconstruct(
        caption_embeds=embeds,
        guidance_scale=2.0,
        scheduler=type(pipeline.scheduler).from_config(pipeline.scheduler.config),
        **call,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    )
    torch.testing.assert_close(drawn.float(), expected, rtol=0, atol=2e-3)


def test_stable_diffusion_3_without_t5(tiny_components, tmp_path):
    """As it is often kept, 9.5 GB smaller: zeros stand for T5's embeddings."""
    folder = teachers.save_pipeline("SD 3.5", tmp_path, text_encoder_3=None, tokenizer_3=None)
    model = assemble(tiny_components, folder)
    assert not model.empty_prompt_embeds[0, 12:].any() and model.empty_prompt_embeds[0, :12].any()


def test_the_command(folders, tiny_components, tmp_path, capsys):
    argv = ["assemble", "--encoder", str(tiny_components / "encoder"), "--decoder", str(folders("SD 3.5"))]
    argv += ["--caption_head", str(tiny_components / "caption_head"), "--output", str(tmp_path / "vlv")]
    assert main([*argv, "--num_queries", "6"]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "vlv")]) == 0
    output = capsys.readouterr().out
    model = VLVModel.from_pretrained(tmp_path / "vlv")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,}" in output and "transformer" in output and "pooled_projection" in output
    assert model.config.image_size is None and model.teacher.image_size == 32
    processor = VLVProcessor.from_pretrained(tmp_path / "vlv")
    assert processor.decoder_image_size == 32 and processor.decoder_tokenizer is None
    captions = processor.batch_decode(model.generate(tiny.pixels(1)[0], max_new_tokens=3))
    assert isinstance(captions[0], str)


# ---- what cannot be a teacher ----------------------------------------------------------------------------------


def refusal(tiny_components, folder, capsys, tmp_path):
    argv = ["assemble", "--encoder", str(tiny_components / "encoder"), "--decoder", str(folder)]
    assert main([*argv, "--output", str(tmp_path / "never")]) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert not (tmp_path / "never").exists() and "Traceback" not in error
    return error


def changed(folder, target, file, **changes):
    shutil.copytree(folder, target)
    config = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps({**config, **changes}))
    return target


def test_an_unknown_family(folders, tiny_components, tmp_path, capsys):
    folder = changed(folders("SDXL"), tmp_path / "flux", "model_index.json", _class_name="FluxPipeline")
    error = refusal(tiny_components, folder, capsys, tmp_path)
    assert "FluxPipeline is not a teacher that VLV knows: it knows StableDiffusionPipeline, " in error
    assert "QwenImagePipeline" in error


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler", "text_encoder"])
def test_a_folder_that_lacks_a_part(part, folders, tiny_components, tmp_path, capsys):
    folder = shutil.copytree(folders("Sana"), tmp_path / "sana")
    shutil.rmtree(folder / part)
    error = refusal(tiny_components, folder, capsys, tmp_path)
    assert error.startswith("vlv assemble") and "The decoder cannot be read from" in error and part in error


def test_a_scheduler_of_the_wrong_kind(folders, tiny_components, tmp_path, capsys):
    file = "scheduler/scheduler_config.json"
    folder = changed(folders("Sana"), tmp_path / "sana", file, **teachers.NOISE)
    scheduler = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({k: v for k, v in scheduler.items() if k in teachers.NOISE}))
    assert "DDIMScheduler is not a flow-matching scheduler" in refusal(tiny_components, folder, capsys, tmp_path)


def test_a_size_that_the_teacher_cannot_draw(folders, tiny_components, tmp_path):
    with pytest.raises(ValueError, match="40x40 pixels, but SanaPipeline draws multiples of 32"):
        VLVModel.from_components(encoder=str(tiny_components / "encoder"), decoder=str(folders("Sana")), image_size=40)


def test_a_diffusers_that_is_too_old(monkeypatch):
    monkeypatch.setattr("families_vlv.diffusers", SimpleNamespace(__version__="0.36.0"))
    with pytest.raises(ValueError, match="diffusers 0.36.0 has no QwenImagePipeline: install a newer one with pip"):
        teachers.build_decoder(teachers.TEACHERS["Qwen-Image"])


def test_a_distilled_teacher_is_warned_of(folders, tiny_components, tmp_path, caplog, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.get_logger("components_vlv"), "propagate", True)
    folder = shutil.copytree(folders("SDXL"), tmp_path / "sdxl-turbo")
    assemble(tiny_components, folder)
    assert "seems to be distilled to a few steps (its name says 'turbo')" in caplog.text
    assert "take the model that it was distilled from" in caplog.text
    caplog.clear()
    if teachers.available("FLUX.2 klein"):
        index = changed(folders("FLUX.2 klein"), tmp_path / "klein", "model_index.json", is_distilled=True)
        assemble(tiny_components, index)
        assert "its model_index.json says is_distilled" in caplog.text
    caplog.clear()
    assemble(tiny_components, folders("SDXL"))
    assert "distilled" not in caplog.text
