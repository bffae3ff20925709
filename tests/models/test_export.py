"""`vlv export`: each part loads with its own library and gives the same results as in the VLV."""

import onnxruntime
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPTextModel, Florence2ForConditionalGeneration

from modeling_vlv import VLVForConditionalGeneration, VLVModel
from processing_vlv import VLVProcessor
from vlv.cli import main


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_repo):
    folder = tmp_path_factory.mktemp("export") / "parts"
    assert main(["export", str(tiny_repo), "--output", str(folder)]) == 0
    return folder


def test_encoder(parts, tiny_model):
    """It gives the same features as the VLV's encoder. Its language head is tied to its word embeddings."""
    florence = Florence2ForConditionalGeneration.from_pretrained(parts / "encoder").eval()
    pixel_values, _ = tiny.pixels(2)
    with torch.no_grad():
        tower, projector = florence.model.vision_tower, florence.model.multi_modal_projector
        features = projector(tower(pixel_values).last_hidden_state)
        assert torch.equal(features, tiny_model.get_image_features(pixel_values))
    weights = tiny_model.encoder.state_dict()
    for name, weight in florence.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert torch.equal(florence.lm_head.weight, tiny_model.encoder.language_model.shared.weight)
    assert AutoTokenizer.from_pretrained(parts / "encoder")("Describe.").input_ids == tiny_model.config.prompt_ids


def test_decoder_draws_the_same(parts, tiny_model):
    """From the context and the same noise, the stock pipeline draws the same picture as `reconstruct`."""
    pipeline = StableDiffusionPipeline.from_pretrained(parts / "decoder")
    pipeline.set_progress_bar_config(disable=True)
    pixel_values, _ = tiny.pixels(1)
    with torch.no_grad():
        context = tiny_model.encode_context(tiny_model.encode(pixel_values))
        settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        expected = tiny_model.reconstruct(
            pixel_values, generator=torch.Generator().manual_seed(1), scheduler=scheduler, **settings
        )
        images = pipeline(
            prompt_embeds=context,
            negative_prompt_embeds=tiny_model.empty_context(),
            generator=torch.Generator().manual_seed(1),
            height=32,
            width=32,
            **settings,
        ).images
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


def test_text_encoder(parts, tiny_model):
    clip = CLIPTextModel.from_pretrained(parts / "decoder", subfolder="text_encoder").eval()
    ids = torch.tensor([tiny_model.config.empty_prompt_ids])
    with torch.no_grad():
        torch.testing.assert_close(clip(ids).last_hidden_state, tiny_model.text_encoder(ids), atol=1e-6, rtol=0)


def test_caption_head(parts, tiny_model, tiny_processor):
    llm = AutoModelForCausalLM.from_pretrained(parts / "caption_head")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(llm(ids).logits, tiny_model.caption_head(ids).logits)
    text = "a small red circle"
    tokenizer = AutoTokenizer.from_pretrained(parts / "caption_head")
    assert tokenizer(text).input_ids == tiny_processor.tokenizer(text).input_ids


def test_the_parts_make_the_same_model_again(parts, tiny_model, tiny_processor):
    components = [str(parts / name) for name in ("encoder", "decoder", "caption_head")]
    model = VLVModel.from_components(*components, num_queries=10, prompt="Describe.").eval()
    adapters = load_file(parts / "adapters" / "adapters.safetensors")
    assert not model.load_state_dict(adapters, strict=False).unexpected_keys
    pixel_values, _ = tiny.pixels(2)
    with torch.no_grad():
        assert torch.equal(model.encode(pixel_values), tiny_model.encode(pixel_values))
    expected = tiny_model.generate(pixel_values, max_new_tokens=8)
    assert torch.equal(model.generate(pixel_values, max_new_tokens=8), expected)
    image = tiny.images(1)
    processor = VLVProcessor.from_components(*components)
    assert torch.equal(processor(images=image)["pixel_values"], tiny_processor(images=image)["pixel_values"])


def test_a_captioner_alone(tiny_model, tiny_processor, tmp_path):
    """Missing parts are left out, and half precision stays half precision."""
    model = tiny.model(VLVForConditionalGeneration).bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path / "vlv")
    tiny_processor.save_pretrained(tmp_path / "vlv")
    assert main(["export", str(tmp_path / "vlv"), "--output", str(tmp_path / "parts")]) == 0
    assert sorted(path.name for path in (tmp_path / "parts" / "decoder").iterdir()) == ["text_encoder", "tokenizer"]
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "caption_head")
    assert llm.dtype == torch.bfloat16
    assert torch.equal(llm.lm_head.weight, model.caption_head.lm_head.weight)


@pytest.mark.slow
def test_onnx(tiny_repo, tiny_model, tiny_processor, tmp_path, capsys):
    """ONNX Runtime makes the prefix of any number of images, and the caption head continues it."""
    assert main(["export", str(tiny_repo), "--output", str(tmp_path / "parts"), "--onnx"]) == 0
    assert capsys.readouterr().out.endswith("encoder, onnx.\n")
    encoder = onnxruntime.InferenceSession(tmp_path / "parts" / "onnx" / "encoder.onnx")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "caption_head")
    for count in (1, 2, 7):
        pixel_values = tiny_processor(images=tiny.images(count, seed=count))["pixel_values"]
        (prefix,) = encoder.run(["prefix"], {"pixel_values": pixel_values.numpy()})
        prefix = torch.from_numpy(prefix)
        with torch.no_grad():
            context = tiny_model.encode_context(tiny_model.encode(pixel_values))
            expected = tiny_model.prefix_projection(context)
        torch.testing.assert_close(prefix, expected, atol=1e-5, rtol=1e-5)
        mask = torch.ones(prefix.shape[:2], dtype=torch.long)
        ids = llm.generate(inputs_embeds=prefix, attention_mask=mask, max_new_tokens=8, do_sample=False)
        assert torch.equal(ids, tiny_model.generate(pixel_values, max_new_tokens=8))


def test_onnx_needs_a_caption_head(tiny_processor, tmp_path, capsys):
    tiny.model(caption_config=None).save_pretrained(tmp_path / "vlv")
    tiny_processor.save_pretrained(tmp_path / "vlv")
    assert main(["export", str(tmp_path / "vlv"), "--output", str(tmp_path / "parts"), "--onnx"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.endswith("has no caption head, and so no prefix to export: leave out --onnx.")
    assert not (tmp_path / "parts").exists()


def test_bad_input(tmp_path, tiny_repo, capsys):
    for source, output, complaint in (
        (tmp_path / "nowhere", tmp_path / "parts", "There is no file or folder"),
        (tiny_repo, tiny_repo, "already exists and is not overwritten"),
    ):
        assert main(["export", str(source), "--output", str(output)]) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert error.startswith("vlv export: error: ") and complaint in error
    assert not (tmp_path / "parts").exists()
