"""What trains and what stays frozen, in each stage and with every setting."""

import copy

import pytest
import tiny
import torch

from modeling_vlv import STAGES, VLVForConditionalGeneration, VLVModel

PREFIXES = {
    "vision_tower": ("encoder.vision_tower.",),
    "image_projection": ("encoder.multi_modal_projector.",),
    "word_embeddings": ("encoder.language_model.shared.",),
    "language_model": ("encoder.language_model.encoder.", "encoder.language_model.decoder."),
    "queries": ("queries",),
    "projection": ("projection.",),
    "text_encoder": ("text_encoder.",),
    "unet": ("unet.",),
    "vae": ("vae.",),
    "prefix_projection": ("prefix_projection.",),
    "caption_head": ("caption_head.",),
}


@pytest.fixture
def model(tiny_model):
    return copy.deepcopy(tiny_model)


@pytest.fixture(scope="module")
def batch():
    """Inputs of both stages at once."""
    pixel_values, decoder_pixel_values = tiny.pixels(2)
    captions = tiny.processor()(text=["a cat", "two small dogs"], return_labels=True)
    return {"pixel_values": pixel_values, "decoder_pixel_values": decoder_pixel_values, **captions}


def stage_inputs(batch, stage):
    names = {
        "autoencode": {"pixel_values", "decoder_pixel_values"},
        "caption": {"pixel_values", "input_ids", "attention_mask", "labels"},
    }[stage]
    return {name: value for name, value in batch.items() if name in names}


def weights_of(model, parts):
    """The names of the parts' parameters, found by their prefixes, independently of the model's own code."""
    prefixes = tuple(prefix for part in parts for prefix in PREFIXES[part])
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_each_weight_belongs_to_exactly_one_part(model):
    assert [name for name, _ in model.named_parts()] == list(PREFIXES)
    names = {name for name, _ in model.named_parameters()}
    assert sorted(name for part in PREFIXES for name in weights_of(model, [part])) == sorted(names)


@pytest.mark.parametrize("stage", ["autoencode", "caption"])
def test_gradients_reach_exactly_what_the_stage_trains(model, batch, stage):
    expected = weights_of(model, STAGES[stage])
    model.set_stage(stage).train()
    assert trainable(model) == expected
    model(**stage_inputs(batch, stage)).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == expected
    # The biases of the keys cancel out in the softmax, so their gradients are zero except for rounding.
    unmoved = {name for name in reached if model.get_parameter(name).grad.abs().max() == 0}
    assert all("k_proj.bias" in name for name in unmoved), unmoved


# The parts that each loss can train.
TEACHABLE = {
    "autoencode": set(PREFIXES) - {"vae", "prefix_projection", "caption_head"},
    "caption": set(PREFIXES) - {"vae", "unet"},
}


@pytest.mark.parametrize(
    ("stage", "part"), [(stage, part) for stage, parts in TEACHABLE.items() for part in sorted(parts)]
)
def test_any_part_can_be_trained_alone(model, batch, stage, part):
    expected = weights_of(model, [part])
    model.set_stage(stage, train=[part]).train()
    assert trainable(model) == expected
    expected -= {"text_encoder.embeddings.token_embedding.weight"}  # the caption embeddings replace its output
    model(**stage_inputs(batch, stage)).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == expected
    assert any(model.get_parameter(name).grad.abs().max() > 0 for name in reached)


@pytest.mark.parametrize("stage", ["autoencode", "caption", "frozen"])
def test_frozen_parts_stay_in_eval_mode(model, stage):
    for mode in (True, False, True):
        model.set_stage(stage).train(mode)
        assert model.training == mode
        for name, part in model.named_parts():
            if isinstance(part, torch.nn.Module) and name != "word_embeddings":
                expected = mode and name in STAGES[stage]
                assert {module.training for module in part.modules() if module is not part} <= {expected}, name
    # In either order: set_stage on a model in training mode puts the frozen parts into eval mode.
    assert not model.set_stage("frozen").encoder.language_model.encoder.training


def test_training_the_word_embeddings_alone_switches_no_dropout_on(model):
    model.set_stage("autoencode", train=["word_embeddings"]).train()
    assert not any(module.training for module in model.encoder.language_model.encoder.modules())
    assert not any(module.training for module in model.encoder.language_model.decoder.modules())


def test_a_frozen_model_in_training_mode_answers_as_in_eval_mode(model, batch):
    model.config.sample_latents = False
    fixed = {"noise": torch.randn(2, 4, 8, 8), "timesteps": torch.tensor([10, 900])}
    expected = model(**batch, **fixed).loss
    assert torch.equal(model.set_stage("frozen").train()(**batch, **fixed).loss, expected)


@pytest.mark.parametrize("stage", ["autoencode", "caption"])
def test_no_frozen_byte_changes_and_everything_else_does(model, batch, stage):
    before = copy.deepcopy(model.state_dict())
    model.set_stage(stage).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(2):
        model(**stage_inputs(batch, stage)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    tied = {"caption_head.lm_head.weight"}  # to the caption head's word embeddings
    assert changed - tied == weights_of(model, STAGES[stage])


def test_stage2_may_train_the_encoders_language_model_too(model, batch):
    parts = (*STAGES["caption"], "language_model")
    model.set_stage("caption", train=parts).train()
    model(**stage_inputs(batch, "caption")).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == weights_of(model, parts)


@pytest.mark.parametrize("loading", [VLVModel.from_pretrained, VLVForConditionalGeneration.from_pretrained])
def test_loading_leaves_the_decoder_and_its_text_encoder_frozen(tiny_repo, loading):
    model = loading(tiny_repo)
    frozen = weights_of(model, ["text_encoder", "unet", "vae"])
    assert frozen and trainable(model) == dict(model.named_parameters()).keys() - frozen
    model.train()
    assert not any(module.training for module in model.text_encoder.modules())


def test_parts_that_cannot_be_trained_are_refused(model):
    with pytest.raises(ValueError, match="Unknown stage 'pretrain': choose autoencode, caption, frozen"):
        model.set_stage("pretrain")
    with pytest.raises(ValueError, match="no part 'encoder' to train: choose among vision_tower, .*, caption_head"):
        model.set_stage("autoencode", train=["encoder"])
    captioner = tiny.model(VLVForConditionalGeneration)
    with pytest.raises(ValueError, match="'autoencode' needs the part vae, which this checkpoint does not have"):
        captioner.set_stage("autoencode")
    headless = tiny.model(caption_config=None)
    with pytest.raises(ValueError, match="'caption' trains prefix_projection, which this checkpoint does not have"):
        headless.set_stage("caption")


def test_a_refused_stage_changes_nothing(model):
    model.set_stage("autoencode").train()
    before = trainable(model)
    with pytest.raises(ValueError):
        model.set_stage("caption", train=["queries", "nonsense"])
    assert trainable(model) == before


def test_a_model_without_decoder_or_caption_head_trains_what_it_has(batch):
    headless = tiny.model(caption_config=None)
    headless.set_stage("autoencode").train()(**stage_inputs(batch, "autoencode")).loss.backward()
    captioner = tiny.model(VLVForConditionalGeneration)
    captioner.set_stage("caption").train()(**stage_inputs(batch, "caption")).loss.backward()
    assert captioner.prefix_projection[0].weight.grad.abs().max() > 0


# ---- gradient checkpointing --------------------------------------------------------------------------------


def checkpointing(model, part):
    part = getattr(model, part)
    return any(getattr(module, "gradient_checkpointing", False) for module in part.modules())


def gradients(model, batch):
    torch.manual_seed(0)  # the same dropout, noise and timesteps
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("parts", [("encoder",), ("unet",), ("caption_head",), ("encoder", "unet", "caption_head")])
def test_gradient_checkpointing_gives_equal_gradients(model, batch, parts):
    train = (*STAGES["autoencode"], *STAGES["caption"])
    model.set_stage("autoencode", train=train).train()
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable(parts=parts)
    assert [part for part in ("encoder", "unet", "caption_head") if checkpointing(model, part)] == list(parts)
    recomputed = []
    watched = {
        "encoder": model.encoder.language_model.decoder.layers[0].fc1,
        "unet": model.unet.up_blocks[1].resnets[0].conv1,
        "caption_head": model.caption_head.model.layers[0].mlp.up_proj,
    }
    for part, module in watched.items():
        module.register_forward_hook(lambda *_, part=part: recomputed.append(part))
    actual = gradients(model, batch)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert {part: recomputed.count(part) for part in watched} == {part: 1 + (part in parts) for part in watched}

    model.gradient_checkpointing_disable()
    assert not any(checkpointing(model, part) for part in watched)


def test_gradient_checkpointing_as_trainer_switches_it_on():
    """Recent releases of Trainer use its new name with more arguments. A captioner has no UNet."""
    captioner = tiny.model(VLVForConditionalGeneration)
    enable = getattr(captioner, "activation_checkpointing_enable", captioner.gradient_checkpointing_enable)
    enable(None)
    assert checkpointing(captioner, "encoder") and checkpointing(captioner, "caption_head")
    getattr(captioner, "activation_checkpointing_disable", captioner.gradient_checkpointing_disable)()
    assert not checkpointing(captioner, "encoder") and not checkpointing(captioner, "caption_head")
