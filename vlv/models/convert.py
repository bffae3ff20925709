"""Checkpoints of the paper's own code, brought over tensor by tensor: `vlv convert`.

What its two stages save, in the names of their tensors:

    stage 1   query_embed, language_proj.*, model.* (Florence-2 in Microsoft's layout), text_encoder.*, unet.*, vae.*
    stage 2   VLV_model.* (the same without unet and vae), mlp.layers.* (the prefix MLP), qwen2_model.* (the LLM)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import AutoConfig, AutoTokenizer, CLIPTextConfig, GenerationConfig

from components_vlv import (
    FLORENCE_EMBEDDINGS,
    fit_florence_config,
    load_florence_config,
    load_part,
    reading_part,
    record_origins,
    rename_florence_key,
    tokenize_empty_prompt,
    tokenize_prompt,
)
from configuration_vlv import VLVConfig
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from stopping_vlv import stop_at_repetition
from vlv.models.published import published_part
from vlv.models.reference import read_checkpoint

KEYS = (
    (r"^VLV_model\.", ""),
    (r"^query_embed$", "queries"),
    (r"^language_proj\.", "projection."),
    (r"^text_encoder\.text_model\.", "text_encoder."),
    (r"^mlp\.layers\.", "prefix_projection."),
    (r"^qwen2_model\.", "caption_head."),
)
DROPPED = (
    # A clone of the *pretrained* embeddings: not the trained ones, whatever its shape suggests.
    (r"^encoder\.language_model\.lm_head\.weight$", "Florence-2's own language head, which a VLV never asks"),
    (r"^encoder\.language_model\.final_logits_bias$", "Florence-2's own language head, which a VLV never asks"),
    (r"^text_encoder\.embeddings\.position_ids$", "counts 0, 1, 2, ...: made again"),
    (r"^caption_head\..*\.rotary_emb\.inv_freq$", "computed from the config"),
)
MAX_NEW_TOKENS = 300  # the length of the captions it was trained on
PART_ARGUMENTS = {
    "queries": "--encoder",
    "encoder": "--encoder",
    "projection": "--encoder",
    "text_encoder": "--decoder",
    "unet": "--decoder",
    "vae": "--decoder",
    "prefix_projection": "--caption_head",
    "caption_head": "--caption_head",
}
NO_DECODER = "none"  # instead of a decoder's id: a captioner that cannot reconstruct
# The two text encoders of Stable Diffusion 1.x and 2.x, told apart by their width where there is no --decoder.
TEXT_ENCODERS = {
    768: {"num_attention_heads": 12, "hidden_act": "quick_gelu"},
    1024: {"num_attention_heads": 16, "hidden_act": "gelu"},
}


@dataclass
class Report:
    """What happened to every tensor of a checkpoint, by its name there."""

    stage: int
    mapped: dict[str, str] = field(default_factory=dict)  # to its name in VLVModel
    tied: dict[str, str] = field(default_factory=dict)  # to the tensor in VLVModel that it equals, bit for bit
    dropped: dict[str, str] = field(default_factory=dict)  # to the reason
    left_over: list[str] = field(default_factory=list)  # an error, unless empty
    added: dict[str, int] = field(default_factory=dict)  # tensors from elsewhere: place to number
    published: dict[str, str] = field(default_factory=dict)  # parts that nobody named: to the published ones' ids

    def __str__(self) -> str:
        lines = [f"A stage-{self.stage} checkpoint. Its tensors:", f"  mapped     {len(self.mapped)}"]
        lines += [f"  tied       {name} = {target}" for name, target in self.tied.items()]
        lines += [f"  dropped    {name}: {reason}" for name, reason in self.dropped.items()]
        lines += [f"  left over  {len(self.left_over)}"]
        lines += [f"  added      {count} from {place}" for place, count in self.added.items()]
        if self.published:
            lines.append("By its sizes it began with these published parts, whose configs and tokenizers it takes:")
            lines += [f"  {part:12} {source}" for part, source in self.published.items()]
        return "\n".join(lines)


# ---- mapping -----------------------------------------------------------------------------------------------


def map_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Report]:
    """
    The tensors under the names of `VLVModel`, tied ones once, and the account of all of them.

    Raises:
        ValueError: the tied copies of a tensor differ.
    """
    report = Report(stage=2 if "VLV_model.query_embed" in tensors else 1)
    weights = {}
    for name, tensor in tensors.items():
        target = rename_key(name)
        reason = next((reason for pattern, reason in DROPPED if re.search(pattern, target)), None)
        if reason:
            report.dropped[name] = reason
            continue
        if target == "queries":
            tensor = tensor.reshape(tensor.shape[-2:])
        elif target == "encoder.multi_modal_projector.image_projection.weight":
            tensor = tensor.T.contiguous()
        weights[target] = tensor
        report.mapped[name] = target
    _tie(weights, report, [f"encoder.{name}" for name in FLORENCE_EMBEDDINGS])
    return weights, report


def rename_key(name: str) -> str:
    """The name in `VLVModel` of a tensor of the paper's code."""
    for pattern, replacement in KEYS:
        name = re.sub(pattern, replacement, name)
    if name.startswith("model."):
        name = "encoder." + rename_florence_key(name.removeprefix("model."))
    return name


def _tie(weights, report, names):
    """Keeps one of the tied copies, under the first name, whichever of them the file holds."""
    copies = {name: weights.pop(name) for name in names if name in weights}
    if not copies:
        return
    first, *others = copies
    for name in others:
        if not torch.equal(copies[name], copies[first]):
            raise ValueError(f"{name} and {first} are one tensor in a VLV, but they differ in this checkpoint.")
    weights[names[0]] = copies[first]
    origins = {target: name for name, target in report.mapped.items()}
    report.mapped[origins[first]] = names[0]
    for name in others:
        del report.mapped[origins[name]]
        report.tied[origins[name]] = names[0]


# ---- converting --------------------------------------------------------------------------------------------


def convert_checkpoint(
    checkpoint: str,
    encoder: str | None = None,
    decoder: str | None = None,
    caption_head: str | None = None,
    image_size: int = 384,
) -> tuple[VLVModel, VLVProcessor, Report]:
    """
    A checkpoint of the paper's code as a model and its processor: the same numbers under other names.

    Args:
        checkpoint: of stage 1 or 2, see [`read_checkpoint`].
        encoder: id or folder of the Florence-2 that it began with: its config, tokenizer and image settings. Here and
            below, `None` is the published part of the checkpoint's size.
        decoder: likewise of its Stable Diffusion. A stage-2 checkpoint takes UNet and VAE from it; with `"none"` it
            becomes a captioner alone.
        caption_head: likewise of the LLM of a stage-2 checkpoint.
        image_size: pixels of the images that it was trained on.

    Raises:
        OSError: a file or part cannot be found or read.
        ValueError: something is no part of such a checkpoint, is missing from it, or contradicts the parts.
    """
    tensors, folder = read_checkpoint(checkpoint)
    weights, report = map_tensors(tensors)
    if report.stage == 1 and decoder == NO_DECODER:
        raise ValueError(f"{checkpoint} is of stage 1: name the Stable Diffusion it was trained with as --decoder.")
    if report.stage == 1 and caption_head is not None:
        raise ValueError(f"{checkpoint} is of stage 1, which has no caption head: leave --caption_head out.")
    encoder = encoder or _published("encoder", "encoder.language_model.shared.weight", weights, report)
    if decoder == NO_DECODER:
        decoder = None
    else:
        width_of = "text_encoder.embeddings.token_embedding.weight"
        decoder = decoder or _published("decoder", width_of, weights, report)
    if report.stage == 2 and caption_head is None:
        width_of = "caption_head.model.embed_tokens.weight"
        caption_head = _published("caption_head", width_of, weights, report)
    dtype = reduce(torch.promote_types, {weight.dtype for weight in weights.values()})  # in which no digit is lost
    takes_decoder = report.stage == 1 or _has_unet(decoder)
    text_encoder_config = _text_encoder_config(decoder, weights)
    positions = text_encoder_config.max_position_embeddings
    with reading_part("encoder", encoder):
        prompt_ids = tokenize_prompt(encoder)
    with reading_part("decoder", decoder):
        empty_prompt_ids = [] if decoder is None else tokenize_empty_prompt(decoder, positions)
    config = VLVConfig(
        encoder_config=_florence_config(encoder, weights),
        text_encoder_config=text_encoder_config,
        decoder_config=_decoder_config(decoder) if takes_decoder else None,
        caption_config=None if caption_head is None else _caption_config(caption_head, weights, report),
        num_queries=len(weights["queries"]),
        image_size=image_size,
        prompt_ids=prompt_ids,
        empty_prompt_ids=empty_prompt_ids,
    )
    record_origins(config, encoder, decoder, caption_head)
    if report.stage == 2 and takes_decoder:
        for name, part_class in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            with reading_part("decoder", decoder):
                part = load_part(part_class, decoder, subfolder=name).state_dict()
            report.added[f"{decoder}/{name}"] = len(part)
            weights.update({f"{name}.{key}": tensor for key, tensor in part.items()})
    _check(checkpoint, config, weights, report)
    tokenizer = None if caption_head is None else _tokenizer(folder, caption_head, config.caption_config)
    processor = VLVProcessor.from_components(
        encoder, decoder, caption_head, image_size=image_size, crop="center", tokenizer=tokenizer
    )
    model = VLVModel.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    if caption_head is not None:
        model.generation_config = _generation_config(caption_head)
        stop_at_repetition(model, processor)  # the paper's captioner never learned to end captions
    return model, processor, report


def _published(part, name, weights, report):
    """The published part of the size that the checkpoint's tensor has."""
    if name not in weights:
        raise ValueError(f"The checkpoint lacks a tensor: {name}, which tells the size of its {part}.")
    report.published[part] = published_part(part, weights[name].shape[1])
    return report.published[part]


def _tokenizer(folder, caption_head, config):
    """
    The captions' own, which lies beside some checkpoints, or the LLM's. A config.json beside it is not read: it is of
    the paper's code, which transformers would ask to run.
    """
    source = folder if (folder / "tokenizer_config.json").is_file() else caption_head
    with reading_part("tokenizer of the caption head", str(source)):
        return AutoTokenizer.from_pretrained(source, config=config)


def _has_unet(decoder):
    """Whether a Stable Diffusion has more than the text encoder; an id's is found missing when it is read."""
    return decoder is not None and (not Path(decoder).is_dir() or (Path(decoder) / "unet").is_dir())


def _florence_config(encoder, weights):
    with reading_part("encoder", encoder):
        config = load_florence_config(encoder)
    part = {name.removeprefix("encoder."): weight for name, weight in weights.items() if name.startswith("encoder.")}
    try:
        fit_florence_config(config, part)
    except KeyError as error:
        raise ValueError(f"The checkpoint lacks a tensor: its Florence-2 has no {error}.") from error
    return config


def _text_encoder_config(decoder, weights):
    token_embedding = weights.get("text_encoder.embeddings.token_embedding.weight")
    position_embedding = weights.get("text_encoder.embeddings.position_embedding.weight")
    if token_embedding is None or position_embedding is None:
        raise ValueError("The checkpoint lacks tensors: its text encoder has no embeddings.")
    if decoder is not None:
        with reading_part("decoder", decoder):
            config = CLIPTextConfig.from_pretrained(decoder, subfolder="text_encoder")
    else:
        width = token_embedding.shape[1]
        if width not in TEXT_ENCODERS:
            raise ValueError(
                f"The checkpoint's text encoder is {width} wide, as no Stable Diffusion 1.x or 2.x's is, so that its "
                "attention heads cannot be told from its weights: give its folder as --decoder (unet and vae may be "
                "missing from it)."
            )
        layers = {name.split(".")[3] for name in weights if name.startswith("text_encoder.encoder.layers.")}
        config = CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=len(layers), **TEXT_ENCODERS[width]
        )
    config.vocab_size, config.max_position_embeddings = len(token_embedding), len(position_embedding)
    return config


def _decoder_config(decoder):
    with reading_part("decoder", decoder):
        return {
            "unet": UNet2DConditionModel.load_config(decoder, subfolder="unet"),
            "vae": AutoencoderKL.load_config(decoder, subfolder="vae"),
            "scheduler": DDPMScheduler.load_config(decoder, subfolder="scheduler"),
        }


def _caption_config(caption_head, weights, report):
    with reading_part("caption head", caption_head):
        config = AutoConfig.from_pretrained(caption_head)
    embeddings, head = "caption_head.model.embed_tokens.weight", "caption_head.lm_head.weight"
    if embeddings in weights and head in weights and not torch.equal(weights[embeddings], weights[head]):
        config.tie_word_embeddings = False  # they were trained apart, whatever the config says
    if config.tie_word_embeddings:
        _tie(weights, report, [embeddings, head])
    if embeddings in weights:
        config.vocab_size = len(weights[embeddings])
    return config


def _generation_config(caption_head):
    """The LLM's own settings, but for the length."""
    try:
        return GenerationConfig.from_pretrained(caption_head, max_new_tokens=MAX_NEW_TOKENS)
    except OSError:
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(caption_head))
        config.max_new_tokens = MAX_NEW_TOKENS
        return config


def _check(checkpoint, config, weights, report):
    """Every tensor has its place, every place its tensor, and their shapes agree."""
    with torch.device("meta"):
        model = VLVModel(config)
    expected = {name: weight for name, weight in model.state_dict().items() if name not in model.all_tied_weights_keys}
    for name, weight in weights.items():
        if name in expected and weight.shape != expected[name].shape:
            argument = PART_ARGUMENTS[name.split(".")[0]]
            raise ValueError(
                f"{checkpoint} does not fit {argument}: {name} is {tuple(weight.shape)} in the checkpoint, but "
                f"{tuple(expected[name].shape)} by the config. Give the part that it was trained from."
            )
    origins = {target: name for name, target in report.mapped.items()}
    report.left_over = [origins.get(name, name) for name in weights if name not in expected]
    missing = [name for name in expected if name not in weights]
    for names, complaint in ((report.left_over, "holds {} that have no place in a VLV"), (missing, "lacks {}")):
        if names:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(f"{checkpoint} {complaint.format(f'{len(names)} tensors')}: {some}")
