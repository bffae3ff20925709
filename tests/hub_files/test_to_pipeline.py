"""`to_pipeline()` and `prompt(images)`: diffusers' own tools on a VLV, and words behind the image."""

import diffusers
import pytest
import teachers
import tiny
import torch
from peft import LoraConfig, get_peft_model_state_dict

from vlv.cli import main

CALL = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}


def draw(pipeline, model, **call):
    pixel_values, _ = tiny.pixels(1)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipeline(**model.prompt(pixel_values), generator=noise, **{"guidance_scale": 2.0, **CALL, **call}).images


@pytest.mark.parametrize(
    "family, targets", [("SD 2 (velocity)", ["to_q", "to_v"]), ("SD 3.5", ["to_q", "to_v", "add_k_proj"])]
)
def test_a_lora(family, targets, tmp_path):
    """One that was made here is saved, loaded into the pipeline of a VLV, changes its pictures, and is removed."""
    model = teachers.model(family, caption_config=None)
    plain = draw(model.to_pipeline(), model)
    other = teachers.model(family, caption_config=None)
    other.denoiser.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    pipeline_class = getattr(diffusers, model.teacher.pipeline)
    layers = get_peft_model_state_dict(other.denoiser)
    if model.teacher.denoiser == "unet":  # as diffusers' training scripts do
        layers = diffusers.utils.convert_state_dict_to_diffusers(layers)
    pipeline_class.save_lora_weights(tmp_path, **{f"{model.teacher.denoiser}_lora_layers": layers})

    pipeline = model.to_pipeline()
    pipeline.load_lora_weights(tmp_path)
    changed = draw(pipeline, model)
    torch.testing.assert_close(changed, draw(other.to_pipeline(), other))
    assert (changed - plain).abs().max() > 0.01
    pixel_values, _ = tiny.pixels(1)
    noise = torch.Generator().manual_seed(0)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    rebuilt = model.reconstruct(pixel_values, generator=noise, scheduler=scheduler, **CALL)
    torch.testing.assert_close(rebuilt, changed, atol=2e-3, rtol=0)  # the model and the pipeline share the denoiser
    pipeline.unload_lora_weights()
    torch.testing.assert_close(draw(pipeline, model), plain)


def test_a_controlnet():
    model = teachers.model("SD 2 (velocity)", caption_config=None)
    control = tiny.randomise(
        diffusers.ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=(16, 32))
    )
    parts = {name: part for name, part in model.to_pipeline().components.items() if name != "image_encoder"}
    pipeline = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)
    first, second = tiny.images(2)
    drawn = [draw(pipeline, model, image=image.resize((32, 32))) for image in (first, second)]
    assert drawn[0].shape == (1, 3, 32, 32) and (drawn[0] - drawn[1]).abs().max() > 0.01


def test_any_scheduler():
    model = teachers.model("SD 2 (velocity)", caption_config=None)
    settings = model.to_pipeline().scheduler.config
    scheduler = diffusers.UniPCMultistepScheduler.from_config(settings)
    expected = model.reconstruct(
        tiny.pixels(1)[0],
        generator=torch.Generator().manual_seed(0),
        scheduler=diffusers.UniPCMultistepScheduler.from_config(settings),
        **CALL,
    )
    torch.testing.assert_close(draw(model.to_pipeline(scheduler), model), expected, atol=1e-5, rtol=0)


# ---- words -----------------------------------------------------------------------------------------------------


def test_words_follow_the_image(tiny_model, tiny_processor):
    """The image's first embeddings, as many as there are positions left, then the words' through the text encoder."""
    pixel_values, _ = tiny.pixels(2)
    tokenizer = tiny_processor.decoder_tokenizer
    ids = tokenizer("night", return_tensors="pt").input_ids[:, 1:]
    assert ids.shape[1] == 6  # five letters and the end of the text
    with torch.no_grad():
        words = tiny_model.text_encoder.embeddings.token_embedding(ids).expand(2, -1, -1)
        joined = torch.cat([tiny_model.encode(pixel_values)[:, :6], words], dim=1)  # of 12 positions
        prompt = tiny_model.prompt(pixel_values, text="night", tokenizer=tokenizer)
        expected = tiny_model.prompt(caption_embeds=joined)
    assert torch.equal(prompt["prompt_embeds"], expected["prompt_embeds"])
    assert prompt["negative_prompt_embeds"].shape == prompt["prompt_embeds"].shape == (2, 12, 24)

    def rebuild(**words):
        return tiny_model.reconstruct(pixel_values, generator=torch.Generator().manual_seed(0), **CALL, **words)

    texts = rebuild(text=["night", "day"], tokenizer=tokenizer)
    assert torch.allclose(texts[:1], rebuild(text="night", tokenizer=tokenizer)[:1], atol=1e-5)
    assert (texts - rebuild()).abs().max() > 0.01


def test_words_that_cannot_be_added(tiny_model, tiny_processor):
    pixel_values, _ = tiny.pixels(2)
    tokenizer = tiny_processor.decoder_tokenizer
    with pytest.raises(ValueError, match="text has 14 tokens, but the text encoder has 12 positions.*shorten it"):
        tiny_model.reconstruct(pixel_values, text="a long long text", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="There are 2 images, but 3 texts"):
        tiny_model.reconstruct(pixel_values, text=["a", "b", "c"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="give tokenizer=processor.decoder_tokenizer"):
        tiny_model.reconstruct(pixel_values, text="night")


def test_the_command_takes_words(tiny_repo, tmp_path, capsys):
    tiny.images(1)[0].save(tmp_path / "image.png")
    argv = ["reconstruct", str(tmp_path / "image.png"), "--model", str(tiny_repo), "--num_inference_steps", "2"]
    for name, words in (("plain", []), ("night", ["--text", "night"])):
        assert main([*argv, "--output", str(tmp_path / name), *words]) == 0
    plain, night = ((tmp_path / name / "image.png").read_bytes() for name in ("plain", "night"))
    assert plain != night
    capsys.readouterr()
    assert main([*argv, "--output", str(tmp_path / "long"), "--text", "at night in the rain"]) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert "positions, one of which is for the image: shorten it." in error and "Traceback" not in error
