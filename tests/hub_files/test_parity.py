"""
Compares every step of the computation with results of the paper's own code (see fixtures/parity/README.md).

The reference's checkpoints are read by `vlv.models.convert`, and the inputs are read from PNG files. No code of the
reference runs here.
"""

import copy
import json

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file

from vlv.models.convert import convert_checkpoint, read_checkpoint

PARITY = FIXTURES / "parity"
IMAGES = [PARITY / "images" / name for name in ("a_120x90.png", "b_77x131.png")]
PARTS = {"encoder": str(PARITY / "components" / "florence"), "decoder": str(PARITY / "components" / "sd")}
HIDDEN_STATES, LOSSES = 5e-5, 1e-6  # processors round differently


@pytest.fixture(scope="module")
def stage1():
    """Model and processor of the stage-1 checkpoint."""
    model, processor, _ = convert_checkpoint(str(PARITY / "stage1_flat"), **PARTS, image_size=64)
    return model.eval(), processor


@pytest.fixture(scope="module")
def stage2():
    """Model and processor of the stage-2 checkpoint."""
    checkpoint, llm = PARITY / "stage2" / "step_3" / "model.pt", PARITY / "components" / "qwen"
    model, processor, _ = convert_checkpoint(str(checkpoint), **PARTS, caption_head=str(llm), image_size=64)
    return model.eval(), processor


@pytest.fixture(scope="module")
def expected1():
    return load_file(PARITY / "stage1_expected.safetensors")


@pytest.fixture(scope="module")
def expected2():
    return load_file(PARITY / "stage2_expected.safetensors")


def assert_near(name, actual, expected, tolerance):
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    distance = (actual.float() - expected.float()).abs().max().item()
    assert distance <= tolerance, f"{name} is off by {distance:.1e}"


# ---- images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_pixel_values_are_exact(stage, expected1, request):
    _, processor = request.getfixturevalue(stage)
    inputs = processor(images=IMAGES, crop="center", return_decoder_pixel_values=True)
    assert torch.equal(inputs["pixel_values"], expected1["florence.pixel_values"])
    assert torch.equal(inputs["decoder_pixel_values"], expected1["image_uint8"] / 127.5 - 1)
    assert torch.equal(processor(images=IMAGES)["pixel_values"], inputs["pixel_values"])  # as in its training


# ---- hidden states -----------------------------------------------------------------------------------------


def check_encoding(model, processor, expected):
    """Pixels to context, in the order of the data flow. The first step that differs fails."""
    pixel_values = processor(images=IMAGES)["pixel_values"]
    seen = {}
    language_model = model.encoder.language_model
    hooks = [
        language_model.encoder.register_forward_hook(
            lambda module, args, kwargs, output: seen.update(
                {"encoder inputs": kwargs["inputs_embeds"], "encoder states": output[0]}
            ),
            with_kwargs=True,
        ),
        language_model.decoder.register_forward_hook(
            lambda module, args, output: seen.update({"decoder states": output[0]})
        ),
    ]
    with torch.no_grad():
        seen["image features"] = model.get_image_features(pixel_values)
        seen["caption_embeds"] = model.encode(pixel_values)
        seen["context"] = model.encode_context(seen["caption_embeds"])
    for hook in hooks:
        hook.remove()
    assert_near("image features", seen["image features"], expected["florence.image_features"], HIDDEN_STATES)
    assert expected["florence.input_ids"].tolist() == [model.config.prompt_ids] * 2, "the prompt is another"
    if "florence.encoder_inputs_embeds" in expected:
        assert_near(
            "encoder inputs", seen["encoder inputs"], expected["florence.encoder_inputs_embeds"], HIDDEN_STATES
        )
    for name, recorded in (
        ("encoder states", "florence.encoder_last_hidden_state"),
        ("decoder states", "florence.decoder_last_hidden_state"),
        ("caption_embeds", "language_proj_out"),
        ("context", "text_encoder_last_hidden_state"),
    ):
        assert_near(name, seen[name], expected[recorded], HIDDEN_STATES)


def test_encoding_stage1(stage1, expected1):
    check_encoding(*stage1, expected1)


def test_encoding_stage2(stage2, expected2):
    check_encoding(*stage2, expected2)


# ---- stage 1: denoising ------------------------------------------------------------------------------------


def check_denoising(model, processor, expected):
    """Pixels to the denoising loss, and the gradients of what trains, through the frozen decoder."""
    inputs = processor(images=IMAGES, return_decoder_pixel_values=True)
    with torch.no_grad():
        moments = model.vae.encode(inputs["decoder_pixel_values"]).latent_dist
        mean = model.encode_latents(inputs["decoder_pixel_values"], sample=False)
    assert_near("posterior mean", moments.mean, expected["vae.posterior_mean"], HIDDEN_STATES)
    assert_near("posterior std", moments.std, expected["vae.posterior_std"], HIDDEN_STATES)
    spread = model.vae.config.scaling_factor * moments.std * expected["vae.posterior_eps"]
    assert_near("latents", mean + spread, expected["latents_scaled"], HIDDEN_STATES)
    predictions = []
    hook = model.unet.register_forward_hook(lambda module, args, output: predictions.append(output.sample))
    output = model(
        pixel_values=inputs["pixel_values"],
        latents=expected["latents_scaled"],
        noise=expected["noise"],
        timesteps=expected["timesteps"],
    )
    hook.remove()
    assert_near("UNet prediction", predictions[0], expected["unet_pred"], HIDDEN_STATES)
    assert_near("loss", output.loss, expected["loss"], LOSSES)
    return output.loss


def test_denoising(stage1, expected1):
    check_denoising(*stage1, expected1)


def test_gradients(stage1, expected1):
    """The reference trains the word embeddings too."""
    model, processor = copy.deepcopy(stage1[0]), stage1[1]
    model.set_stage("autoencode", train=["queries", "projection", "language_model", "word_embeddings"]).eval()
    check_denoising(model, processor, expected1).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    recorded = load_file(PARITY / "stage1_grads.safetensors")
    rows, shared = recorded.pop("shared_rows.index"), recorded.pop("shared_rows.grad")
    recorded = {
        name.replace("model.language_model.model.", "encoder.language_model."): t for name, t in recorded.items()
    }
    recorded["queries"] = recorded.pop("query_embed")[0]
    for name in [name for name in recorded if name.startswith("language_proj.")]:
        recorded[name.replace("language_proj", "projection")] = recorded.pop(name)
    gradients["shared rows"] = gradients["encoder.language_model.shared.weight"][rows]
    recorded["shared rows"] = shared
    assert len(recorded) == 8
    for name, expected in recorded.items():
        scale = expected.abs().max().item()
        assert scale > 0
        assert_near(f"gradient of {name}", gradients[name] / scale, expected / scale, 1e-4)
    assert not any(name.startswith(("unet.", "vae.", "text_encoder.", "encoder.vision_tower.")) for name in gradients)


# ---- stage 2: captions -------------------------------------------------------------------------------------


def check_captioning(model, processor, expected):
    """The prefix, and the caption loss of two captions."""
    pixel_values = processor(images=IMAGES)["pixel_values"]
    with torch.no_grad():
        output = model(
            pixel_values=pixel_values,
            input_ids=expected["lm.input_ids"],
            attention_mask=expected["lm.tokenizer_mask"],
            labels=expected["lm.labels"][:, 77:],
        )
        prefix = model.prefix_projection(output.context)
    assert_near("prefix", prefix, expected["prefix"], HIDDEN_STATES)
    # logits[:, 0] is from the prefix's last position, 76
    assert_near("logits", output.logits[:, :16], expected["lm.logits_pos76_to_91"], HIDDEN_STATES)
    assert_near("caption loss", output.loss, expected["lm_loss"], LOSSES)


def test_captioning(stage2, expected2):
    check_captioning(*stage2, expected2)


def test_labels_are_the_references_with_an_end(stage2, expected2):
    """The reference has no label for the end of a caption. All its other labels are equal to the processor's."""
    captions = json.loads((PARITY / "stage2_text.json").read_text())["captions_for_lm_loss"]
    labels = stage2[1](text=captions, return_labels=True)["labels"]
    for ours, theirs in zip(labels, expected2["lm.labels"], strict=True):
        theirs = theirs[theirs != -100]
        assert ours[: len(theirs)].tolist() == theirs.tolist()
        assert ours[len(theirs)] == stage2[0].generation_config.eos_token_id
        assert (ours[len(theirs) + 1 :] == -100).all()


@pytest.mark.parametrize("beams, recorded", [(1, "gen.greedy.ids"), (4, "gen.beam4.ids")])
def test_generated_ids(stage2, expected2, beams, recorded):
    model, processor = stage2
    pixel_values = processor(images=IMAGES)["pixel_values"]
    ids = model.generate(pixel_values, num_beams=beams, early_stopping=beams > 1, max_new_tokens=16)
    assert torch.equal(ids, expected2[recorded])
    texts = json.loads((PARITY / "stage2_text.json").read_text())["generated_text"]
    assert processor.batch_decode(ids) == [text.strip() for text in texts["beam4" if beams > 1 else "greedy"]]


# ---- the tests themselves: they find each of these mistakes, and name its place ----------------------------


def reshaped_projection(model):
    """Microsoft's image projection is stored as (in, out), transposed compared with the weight of a Linear."""
    weight = model.encoder.multi_modal_projector.image_projection.weight
    weight.data = weight.data.T.reshape(weight.shape)


def swapped_rows_and_columns(model):
    position = model.encoder.multi_modal_projector.image_position_embed
    position.row_embeddings, position.column_embeddings = position.column_embeddings, position.row_embeddings


def non_causal_queries(model):
    decoder = model.encoder.language_model.decoder
    see_all = torch.zeros(2, 1, model.config.num_queries, model.config.num_queries)
    replace_forward(decoder, lambda forward, **inputs: forward(**inputs, attention_mask=see_all))


def text_before_image(model):
    encoder, length = model.encoder.language_model.encoder, len(model.config.prompt_ids)
    replace_forward(encoder, lambda forward, inputs_embeds: forward(inputs_embeds=inputs_embeds.roll(length, dims=1)))


def missing_end_of_prompt(model):
    model.config = copy.deepcopy(model.config)
    model.config.prompt_ids = model.config.prompt_ids[:-1]


def embeddings_of_the_language_head(model):
    """`lm_head` is a copy of the embeddings before training. The prompt uses the trained embeddings."""
    tensors, _ = read_checkpoint(str(PARITY / "stage1_flat"))
    model.encoder.language_model.shared.weight.data = tensors["model.language_model.lm_head.weight"].clone()


def positions_without_offset(model):
    table = model.encoder.language_model.encoder.embed_positions.weight
    table.data = table.data.roll(2, dims=0)


def non_causal_text_encoder(model):
    encoder = model.text_encoder.encoder
    replace_forward(encoder, lambda forward, **inputs: forward(**{**inputs, "is_causal": False}))


def approximate_gelu(model):
    model.projection[1] = torch.nn.GELU(approximate="tanh")


def unscaled_latents(model):
    model.vae.register_to_config(scaling_factor=1.0)


def velocity_as_target(model):
    model.teacher.schedule.register_to_config(prediction_type="v_prediction")


def replace_forward(module, forward):
    original = module.forward
    module.forward = lambda **inputs: forward(original, **inputs)


@pytest.mark.parametrize(
    "mistake, found",
    [
        (reshaped_projection, "image features is off"),
        (swapped_rows_and_columns, "image features is off"),
        (missing_end_of_prompt, "the prompt is another"),
        (embeddings_of_the_language_head, "encoder inputs is off"),
        (text_before_image, "encoder states is off"),
        (positions_without_offset, "encoder states is off"),
        (non_causal_queries, "decoder states is off"),
        (approximate_gelu, "caption_embeds is off"),
        (non_causal_text_encoder, "context is off"),
        (unscaled_latents, "latents is off"),
        (velocity_as_target, "loss is off"),
    ],
)
def test_a_mistake_is_found(stage1, expected1, mistake, found):
    model = copy.deepcopy(stage1[0])
    mistake(model)
    with pytest.raises(AssertionError, match=found):
        check_encoding(model, stage1[1], expected1)
        check_denoising(model, stage1[1], expected1)
