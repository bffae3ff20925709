"""Saving and loading: nothing changes, nothing is missing, and nothing unnecessary is read."""

import copy
import gc
import json
import logging
import warnings
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from paths import FIXTURES, ROOT
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPTextModel, Florence2ForConditionalGeneration

from configuration_vlv import VLVConfig
from modeling_vlv import CODE_FILES, VLVForConditionalGeneration, VLVModel
from processing_vlv import VLVProcessor

SAVED = FIXTURES / "saved"
GREEDY = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture(scope="module")
def pixel_values():
    return tiny.pixels(3)[0]


@pytest.fixture
def said(caplog):
    """The libraries' log messages and warnings during a test."""
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers", "accelerate")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    gc.collect()  # what earlier tests left open warns now
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [record.getMessage() for record in caplog.records] + [str(warning.message) for warning in caught]
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def assert_same_weights(model, expected):
    actual, expected = model.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    different = [name for name in actual if not torch.equal(actual[name], expected[name])]
    assert not different


# ---- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"decoder_config": None}, {"caption_config": None}], ids=str)
def test_weights_come_back_bitwise(tmp_path, settings, said):
    model = tiny.model(**settings)
    model.save_pretrained(tmp_path)
    loaded, info = VLVModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_weights(loaded, model)
    assert not any(info.values()), info
    assert not loaded.training
    assert not said()


def test_weights_come_back_bitwise_from_shards_and_in_half_precision(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert_same_weights(VLVModel.from_pretrained(tmp_path / "shards"), tiny_model)

    half = copy.deepcopy(tiny_model).half()
    half.save_pretrained(tmp_path / "half")
    assert_same_weights(VLVModel.from_pretrained(tmp_path / "half"), half)  # in the dtype that it was saved in
    assert_same_weights(VLVModel.from_pretrained(tmp_path / "half", dtype=torch.float32), copy.deepcopy(half).float())


@pytest.mark.parametrize("saved, asked", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "auto")])
def test_all_weights_have_one_dtype_whatever_the_nested_configs_name(tiny_repo, tmp_path, saved, asked):
    """A model that was loaded before it was saved has configs of parts, and of their parts, that name its dtype."""
    VLVModel.from_pretrained(tiny_repo, dtype=saved).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part in (config["encoder_config"], config["encoder_config"]["text_config"], config["caption_config"]):
        part["dtype"] = "float32" if saved == "float16" else saved  # as a checkpoint that was halved for publishing
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = getattr(torch, saved if asked == "auto" else asked)
    for model_class in (VLVModel, VLVForConditionalGeneration):
        model = model_class.from_pretrained(tmp_path, dtype=asked)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
    model = VLVModel(VLVConfig.from_pretrained(tmp_path))  # as any torch module, in the default dtype
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_an_untied_caption_head_stays_untied(tmp_path):
    caption_config = tiny.caption_config()
    caption_config.tie_word_embeddings = False
    model = tiny.model(caption_config=caption_config)
    model.save_pretrained(tmp_path)
    loaded = VLVModel.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    head = loaded.caption_head
    assert head.lm_head.weight is not head.get_input_embeddings().weight


def test_tied_weights_stay_tied_and_are_stored_once(tiny_repo):
    loaded = VLVModel.from_pretrained(tiny_repo)
    language_model, head = loaded.encoder.language_model, loaded.caption_head
    assert language_model.encoder.embed_tokens.weight is language_model.shared.weight
    assert language_model.decoder.embed_tokens.weight is language_model.shared.weight
    assert head.lm_head.weight is head.get_input_embeddings().weight
    with safe_open(tiny_repo / "model.safetensors", "pt") as file:
        assert "caption_head.lm_head.weight" not in file.keys()  # noqa: SIM118
        assert sum("shared" in name or "embed_tokens" in name for name in file.keys()) == 2  # noqa: SIM118


def test_generation_settings_come_back(tmp_path, tiny_model, pixel_values):
    model = copy.deepcopy(tiny_model)
    model.generation_config.update(num_beams=3, max_new_tokens=7)
    model.save_pretrained(tmp_path)
    loaded = VLVForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.num_beams == 3
    assert torch.equal(loaded.generate(pixel_values=pixel_values), model.generate(pixel_values=pixel_values))


def test_a_saved_repo_has_its_code(tiny_repo, tmp_path):
    for name in CODE_FILES:
        assert (tiny_repo / name).read_bytes() == (ROOT / name).read_bytes()
    # saved again into its own folder, and from there into another folder
    model = VLVModel.from_pretrained(tiny_repo)
    for folder in (tmp_path, tmp_path):
        model.save_pretrained(folder)
        VLVProcessor.from_pretrained(tiny_repo).save_pretrained(folder)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in Path(tiny_repo).iterdir()}


def test_only_the_main_process_writes_the_code(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.py"))


def test_a_processor_comes_back(tiny_repo, tiny_processor, tmp_path):
    loaded = VLVProcessor.from_pretrained(tiny_repo)
    assert loaded.to_dict().items() <= tiny_processor.to_dict().items()
    text = "A cat, twice as large as life; naïve."
    for name in ("tokenizer", "encoder_tokenizer", "decoder_tokenizer"):
        assert getattr(loaded, name)(text).input_ids == getattr(tiny_processor, name)(text).input_ids
    cropping = VLVProcessor.from_pretrained(tiny_repo, crop="center")
    assert cropping.crop == "center"
    cropping.save_pretrained(tmp_path)
    assert VLVProcessor.from_pretrained(tmp_path).crop == "center"


# ---- the captioner needs no decoder ------------------------------------------------------------------------


class ReadingRecorder:
    """Replaces `safetensors.safe_open` and records each tensor that is read."""

    def __init__(self, read):
        self.read = read

    def __call__(self, *args, **kwargs):
        recorder, file = self, safe_open(*args, **kwargs)

        class Slice:
            def __init__(self, name):
                self.name, self.slice = name, file.get_slice(name)

            def __getitem__(self, index):
                recorder.read.add(self.name)
                return self.slice[index]

            def __getattr__(self, attribute):
                return getattr(self.slice, attribute)

        class File:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                return None

            def get_slice(self, name):
                return Slice(name)

            def get_tensor(self, name):
                recorder.read.add(name)
                return file.get_tensor(name)

            def __getattr__(self, attribute):
                return getattr(file, attribute)

        return File()


@pytest.fixture
def read(monkeypatch):
    """The names of the tensors that transformers reads from files."""
    names = set()
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", ReadingRecorder(names))
    return names


def forbid_building(monkeypatch):
    def fail(self, *args, **kwargs):
        raise AssertionError(f"{type(self).__name__} was built")

    for part in (UNet2DConditionModel, AutoencoderKL):
        monkeypatch.setattr(part, "__init__", fail)


@pytest.mark.parametrize(
    ("model_class", "arguments"), [(VLVForConditionalGeneration, {}), (VLVModel, {"decoder_config": None})]
)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_captioning_neither_builds_nor_reads_the_decoder(
    tiny_model, tiny_repo, tmp_path, monkeypatch, read, said, pixel_values, model_class, arguments, sharded
):
    folder = tiny_repo
    if sharded:
        folder = tmp_path
        tiny_model.save_pretrained(folder, max_shard_size="300KB")
    forbid_building(monkeypatch)
    model, info = model_class.from_pretrained(folder, **arguments, output_loading_info=True)
    assert not any(info.values()), info
    assert not said()
    assert model.unet is None and model.vae is None and model.teacher is None
    assert {name.split(".")[0] for name in read} == {
        "encoder", "queries", "projection", "text_encoder", "prefix_projection", "caption_head"
    }  # fmt: skip
    arguments = {"pixel_values": pixel_values, **GREEDY}
    assert torch.equal(model.generate(**arguments), tiny_model.generate(**arguments))


def test_rebuilding_needs_no_caption_head(tiny_repo, tiny_model, read, said, pixel_values):
    model, info = VLVModel.from_pretrained(tiny_repo, caption_config=None, output_loading_info=True)
    assert not any(info.values()), info
    assert not said()
    assert model.caption_head is None and model.prefix_projection is None
    assert {name.split(".")[0] for name in read} == {
        "encoder", "queries", "projection", "text_encoder", "unet", "vae"
    }  # fmt: skip
    assert torch.equal(model.encode(pixel_values), tiny_model.encode(pixel_values))


def test_the_whole_model_reads_everything_once(tiny_repo, tiny_model, read):
    """The counterpart of the tests above: the recorder does see the tensors that are read."""
    VLVModel.from_pretrained(tiny_repo)
    tied = {"caption_head.lm_head.weight"} | {
        f"encoder.language_model.{half}.embed_tokens.weight" for half in ("encoder", "decoder")
    }
    assert read == tiny_model.state_dict().keys() - tied


def test_the_caller_keeps_the_decoder_of_the_config(tiny_config):
    VLVForConditionalGeneration(tiny_config)
    assert tiny_config.decoder_config is not None


def test_a_captioner_saved_again_is_a_checkpoint_without_decoder(tiny_repo, tmp_path, tiny_model, pixel_values, said):
    VLVForConditionalGeneration.from_pretrained(tiny_repo).save_pretrained(tmp_path)
    model = VLVModel.from_pretrained(tmp_path)
    assert model.unet is None
    assert not said()
    arguments = {"pixel_values": pixel_values, **GREEDY}
    assert torch.equal(model.generate(**arguments), tiny_model.generate(**arguments))


def test_unexpected_or_missing_weights_are_reported(tiny_repo, tmp_path, tiny_model, said):
    """Parts that are left out must not hide a damaged checkpoint."""
    state = dict(tiny_model.state_dict())
    state["prefix_projection.9.weight"] = torch.zeros(2)
    del state["projection.0.bias"]
    tiny_model.save_pretrained(tmp_path, state_dict=state)
    _, info = VLVForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"prefix_projection.9.weight"}
    assert set(info["missing_keys"]) == {"projection.0.bias"}
    assert any("prefix_projection.9.weight" in sentence for sentence in said())


# ---- from the parts ----------------------------------------------------------------------------------------


def assemble(components, **arguments):
    parts = [components / "encoder", components / "decoder", components / "caption_head"]
    return VLVModel.from_components(*parts, **arguments), VLVProcessor.from_components(*parts, **arguments)


@torch.no_grad()
def test_a_vlv_of_the_parts_computes_what_the_parts_do(tiny_components, pixel_values):
    model, _ = assemble(tiny_components)
    florence = Florence2ForConditionalGeneration.from_pretrained(tiny_components / "encoder")
    clip = CLIPTextModel.from_pretrained(tiny_components / "decoder", subfolder="text_encoder")
    unet = UNet2DConditionModel.from_pretrained(tiny_components / "decoder", subfolder="unet")
    vae = AutoencoderKL.from_pretrained(tiny_components / "decoder", subfolder="vae")
    llm = AutoModelForCausalLM.from_pretrained(tiny_components / "caption_head")

    tokenizer = AutoTokenizer.from_pretrained(tiny_components / "encoder")
    prompt = "<image>" * 17 + "Describe with a paragraph what is shown in the image."
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    ids = torch.cat([ids[:, 1:18], ids[:, :1], ids[:, 18:]], dim=1)  # the image comes before <s>, as in Florence-2
    words = torch.arange(40, 52)
    answers = florence.model(input_ids=ids, pixel_values=pixel_values[:1], decoder_input_ids=words[None])
    model.queries.data = florence.get_input_embeddings().weight[words].clone()
    caption_embeds = model.encode(pixel_values[:1])
    torch.testing.assert_close(caption_embeds, model.projection(answers.last_hidden_state))

    ids = torch.randint(0, 500, (2, 12))
    context = clip(input_ids=ids).last_hidden_state
    assert torch.equal(model.encode_context(clip.get_input_embeddings()(ids)), context)
    empty = AutoTokenizer.from_pretrained(tiny_components / "decoder", subfolder="tokenizer")(
        "", padding="max_length", return_tensors="pt"
    )
    assert torch.equal(model.empty_context(), clip(input_ids=empty.input_ids).last_hidden_state)
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    assert torch.equal(model.denoise(latents, timesteps, context), unet(latents, timesteps, context).sample)
    decoded = vae.decode(latents / vae.config.scaling_factor).sample
    torch.testing.assert_close(model.decode_latents(latents), decoded)
    embeds = torch.randn(2, 5, 40)
    assert torch.equal(model.caption_head(inputs_embeds=embeds).logits, llm(inputs_embeds=embeds).logits)


def test_a_processor_of_the_parts_has_their_settings(tiny_components):
    _, processor = assemble(tiny_components)
    settings = json.loads((tiny_components / "encoder" / "preprocessor_config.json").read_text())
    assert (processor.image_height, processor.image_width) == (32, 32)
    assert processor.image_mean == settings["image_mean"] and processor.image_std == settings["image_std"]
    assert processor.decoder_image_size == 8 * 4  # the UNet's sample size times the VAE's factor
    text = "A cat, naïve."
    parts = {"tokenizer": "caption_head", "encoder_tokenizer": "encoder", "decoder_tokenizer": "decoder/tokenizer"}
    for name, folder in parts.items():
        expected = AutoTokenizer.from_pretrained(tiny_components / folder)
        assert getattr(processor, name)(text).input_ids == expected(text).input_ids

    processor = VLVProcessor.from_components(
        tiny_components / "encoder", tiny_components / "decoder", image_size=64, crop="center"
    )
    assert processor.tokenizer is processor.decoder_tokenizer
    assert (processor.decoder_image_size, processor.crop) == (64, "center")


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(tiny_components, tmp_path):
    tokenizer = tiny.caption_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    processor = VLVProcessor.from_components(tiny_components / "encoder", tiny_components / "decoder", tmp_path)
    assert processor.tokenizer.pad_token == "<|endoftext|>"
    assert processor(text=["a", "abc"])["input_ids"].shape == (2, 3)


def test_processor_settings_are_read_from_either_layout_of_florences_files(tiny_components, tmp_path):
    """transformers 5 saves a processor in one file. The published Florence-2 have a separate file for images."""
    images = json.loads((tiny_components / "encoder" / "preprocessor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": images}))
    AutoTokenizer.from_pretrained(tiny_components / "encoder").save_pretrained(tmp_path)
    processor = VLVProcessor.from_components(tmp_path, tiny_components / "decoder")
    assert processor.image_mean == images["image_mean"]


@pytest.mark.parametrize("image_size", [None, 64])
def test_a_vlv_of_the_parts_is_saved_and_works(tiny_components, tmp_path, image_size):
    model, processor = assemble(tiny_components, image_size=image_size)
    inputs = processor(images=tiny.images(2), return_decoder_pixel_values=True)
    size = image_size or 32
    assert inputs["decoder_pixel_values"].shape == (2, 3, size, size)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = VLVModel.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    assert str(tiny_components) not in (tmp_path / "config.json").read_text()  # paths of this machine are not saved
    captions = VLVProcessor.from_pretrained(tmp_path).batch_decode(loaded.generate(inputs["pixel_values"], **GREEDY))
    assert captions == processor.batch_decode(model.generate(inputs["pixel_values"], **GREEDY))
    assert [picture.size for picture in loaded.reconstruct(inputs["pixel_values"], num_inference_steps=2)] == [
        (size, size)
    ] * 2
    labels = processor(text=["a cat", "dogs"], return_labels=True)
    assert loaded(**inputs, **labels).loss.isfinite()


# ---- other releases of transformers ------------------------------------------------------------------------


@pytest.mark.parametrize("folder", sorted(SAVED.glob("transformers-*")), ids=lambda folder: folder.name)
def test_checkpoints_of_other_releases_work_in_this_one(folder, said):
    """`tests/fixtures/saved/save.py` saved them with the release in the name of the folder."""
    model, info = VLVModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    processor = VLVProcessor.from_pretrained(folder)
    assert not any(info.values()), info
    assert not said()
    expected = json.loads((folder / "expected.json").read_text())
    pixel_values = processor(images=tiny.images(3))["pixel_values"]
    assert processor.batch_decode(model.generate(pixel_values, **GREEDY)) == expected["captions"]
    noise = torch.Generator().manual_seed(0)
    pictures = model.reconstruct(pixel_values, num_inference_steps=2, generator=noise, output_type="pt")
    torch.testing.assert_close(pictures.mean(dim=(2, 3)), torch.tensor(expected["mean_colours"]), rtol=1e-3, atol=1e-3)
    assert processor.decoder_tokenizer("a cat").input_ids == expected["decoder_ids"]


def test_a_checkpoint_of_the_oldest_and_of_a_recent_release_are_kept():
    versions = {folder.name.removeprefix("transformers-") for folder in SAVED.glob("transformers-*")}
    assert "5.0.0" in versions and len(versions) >= 2
