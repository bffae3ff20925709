"""Reads the pretrained parts of a VLV: a Florence-2, a text-to-image teacher, and a language model."""

import functools
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPTextModel,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Model,
    Florence2VisionConfig,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.utils import cached_file, logging

try:
    from .configuration_vlv import VLVConfig
    from .decoders_vlv import Decoder
    from .families_vlv import FAMILIES, build_decoder, family_of
    from .layers_vlv import device_of  # noqa: F401  (transformers 5.0 copies what this file names, and no further)
except ImportError:
    from configuration_vlv import VLVConfig
    from decoders_vlv import Decoder
    from families_vlv import FAMILIES, build_decoder, family_of

logger = logging.get_logger(__name__)

# The arguments that say how the Hub is asked. They go to every part.
HUB_KWARGS = ("revision", "token", "local_files_only", "cache_dir", "force_download", "proxies")
# What Florence-2's processor writes for <MORE_DETAILED_CAPTION>, the task that the paper uses.
TASK_PROMPT = "Describe with a paragraph what is shown in the image."
# Enough for a detailed caption, as in the paper. A trained model stops earlier by itself.
MAX_NEW_TOKENS = 300
# Caption embeddings per image where no text encoder says how many it has positions for. As in the paper.
NUM_QUERIES = 77
# Words in the names of teachers that were distilled to a few steps.
DISTILLED = ("turbo", "schnell", "lightning", "lcm", "hyper", "sprint", "flash", "dmd", "distill")


# ---- all parts together ------------------------------------------------------------------------------------


@dataclass
class Components:
    """What a new `VLVModel` is built from."""

    config: VLVConfig
    weights: dict[str, torch.Tensor]  # under the names of `VLVModel`
    dtype: torch.dtype  # of all weights
    generation_config: GenerationConfig | None  # the caption head's


def load_components(
    encoder: str,
    decoder: str,
    caption_head: str | None = None,
    num_queries: int | None = None,
    image_size: int | None = None,
    prompt: str = TASK_PROMPT,
    dtype: torch.dtype | str | None = None,
    projection_start: str = "zero",
    **hub_kwargs,
) -> Components:
    """Reads what `VLVModel.from_components` is given. The arguments and errors are described there."""
    if projection_start not in ("zero", "mean"):
        raise ValueError(f"projection_start is {projection_start!r}: choose 'zero' or 'mean'.")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    loading = {"dtype": dtype or "auto", **hub_kwargs}
    llm = generation_config = None
    with reading_part("encoder", encoder):
        florence = load_florence(encoder, **loading)
        prompt_ids = tokenize_prompt(encoder, prompt, **hub_kwargs)
    with reading_part("decoder", decoder):
        teacher = load_teacher(decoder, num_queries, dtype, **hub_kwargs)
    if caption_head is not None:
        with reading_part("caption head", caption_head):
            llm = load_part(AutoModelForCausalLM, caption_head, **loading)
        generation_config = llm.generation_config
        if generation_config.max_new_tokens is None:  # transformers would stop after 20 tokens
            generation_config.max_new_tokens = MAX_NEW_TOKENS
    parts = {"encoder": florence, "caption_head": llm, **teacher.parts}
    weights = {
        f"{name}.{key}": weight
        for name, part in parts.items()
        if part is not None
        for key, weight in module_weights(part).items()
    }
    dtype = dtype or functools.reduce(torch.promote_types, {weight.dtype for weight in weights.values()})
    weights |= teacher.empty_prompt
    if projection_start == "mean":
        words = weights.get("text_encoder.embeddings.token_embedding.weight")
        words = weights["empty_prompt_embeds"][0] if words is None else words
        weights["projection.2.bias"] = words.float().mean(0)
    config = VLVConfig(
        encoder_config=florence.config,
        caption_config=None if llm is None else llm.config,
        image_size=image_size,
        prompt_ids=prompt_ids,
        **teacher.config,
    )
    record_origins(config, encoder, decoder, caption_head)
    return Components(config, weights, dtype, generation_config)


def record_origins(config: VLVConfig, encoder: str, decoder: str | None, caption_head: str | None) -> None:
    """Records which Hub models the parts are. A local folder is not recorded: it means nothing on another machine."""
    sources = (encoder, decoder, caption_head)
    encoder, decoder, caption_head = ("" if not source or Path(source).is_dir() else str(source) for source in sources)
    config.encoder_config._name_or_path = encoder
    if config.text_encoder_config is not None:
        config.text_encoder_config._name_or_path = decoder
    if config.caption_config is not None:
        config.caption_config._name_or_path = caption_head
    for part in (config.decoder_config or {}).values():
        if isinstance(part, dict):
            part["_name_or_path"] = decoder


# ---- any part ----------------------------------------------------------------------------------------------


@contextmanager
def reading_part(part: str, source: str) -> Iterator[None]:
    """Turns the libraries' errors into one sentence that names the part and where it was read from."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        if not Path(source).is_dir() and isinstance(error, OSError):
            reason = f"there is no such folder, and no such model was found on the Hub ({reason})"
        raise (OSError if isinstance(error, OSError) else ValueError)(
            f"The {part} cannot be read from {source}: {reason}"
        ) from error


def load_part(part_class, source: str | None, **kwargs):
    """Loads a pretrained part. A missing weight is an error here; the libraries would fill it with random numbers."""
    part, info = part_class.from_pretrained(source, output_loading_info=True, **kwargs)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} of its weights, such as {missing[0]}.")
    return part


def module_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights and persistent buffers. Tied ones come once: older releases of transformers untie duplicates."""
    once = dict(module.named_parameters()).keys() | dict(module.named_buffers()).keys()
    return {key: weight for key, weight in module.state_dict().items() if key in once}


def tokenize_prompt(encoder: str, prompt: str = TASK_PROMPT, **hub_kwargs) -> list[int]:
    """The task prompt in a Florence-2's token ids, <s> and </s> included."""
    return AutoTokenizer.from_pretrained(encoder, **hub_kwargs)(prompt).input_ids


def tokenize_empty_prompt(decoder: str, positions: int, **hub_kwargs) -> list[int]:
    """The empty prompt in the token ids of a Stable Diffusion's text encoder, padded to its positions."""
    tokenizer = AutoTokenizer.from_pretrained(decoder, subfolder="tokenizer", **hub_kwargs)
    return tokenizer("", padding="max_length", max_length=positions).input_ids


# ---- the text-to-image teacher ---------------------------------------------------------------------------------


@dataclass
class Teacher:
    """What is read of a text-to-image model."""

    config: dict  # settings of `VLVConfig`
    parts: dict[str, torch.nn.Module]  # under the names of `VLVModel`
    empty_prompt: dict[str, torch.Tensor]  # likewise


def load_teacher(
    source: str, num_queries: int | None = None, dtype: torch.dtype | None = None, **hub_kwargs
) -> Teacher:
    """
    A text-to-image model in diffusers' layout. Of a Stable Diffusion 1.x or 2.x the text encoder is kept. Of the other
    families only what it makes of the empty prompt is kept.
    """
    config = read_decoder_config(source, **hub_kwargs)
    decoder = build_decoder(config)
    warn_if_distilled(source, config)
    parts = {
        name: load_part(part_class, source, subfolder=name, torch_dtype=dtype, **hub_kwargs)
        for name, part_class in decoder.classes().items()
    }
    config |= {name: part.config for name, part in parts.items()}
    config.pop("is_distilled", None)
    if not decoder.reads_text_encoder:
        num_queries = NUM_QUERIES if num_queries is None else num_queries
        context, pooled = encode_empty_prompt(source, decoder, **hub_kwargs)
        empty = {"empty_prompt_embeds": context[:, :num_queries]}
        if pooled is not None:
            empty["empty_pooled_embeds"] = pooled
        config["empty_prompt_length"] = empty["empty_prompt_embeds"].shape[1]
        settings = {"text_encoder_config": None, "context_width": decoder.context_width, "num_queries": num_queries}
        return Teacher(settings | {"decoder_config": config}, parts, empty)
    clip = load_part(CLIPTextModel, source, subfolder="text_encoder", dtype=dtype or "auto", **hub_kwargs)
    positions = clip.config.max_position_embeddings
    settings = {
        "text_encoder_config": clip.config,
        "num_queries": positions if num_queries is None else num_queries,
        "empty_prompt_ids": tokenize_empty_prompt(source, positions, **hub_kwargs),
    }
    return Teacher(
        settings | {"decoder_config": config}, parts | {"text_encoder": getattr(clip, "text_model", clip)}, {}
    )


def read_index(source: str, **hub_kwargs) -> dict:
    """The model_index.json of a text-to-image model. A Stable Diffusion may come without one."""
    try:
        return diffusers.DiffusionPipeline.load_config(source, **hub_kwargs)
    except OSError:
        return {}


def read_decoder_config(source: str, **hub_kwargs) -> dict:
    """`decoder_config` of [`VLVConfig`], from the configs of a text-to-image model in diffusers' layout."""
    index = read_index(source, **hub_kwargs)
    config = {name: index[name] for name in ("_class_name", "is_distilled") if name in index}
    family = family_of(config)
    if family is FAMILIES["StableDiffusionPipeline"]:
        config.pop("_class_name", None)  # as in every checkpoint from before there were other families
    texts = [name for name, kind in index.items() if name.startswith("text_encoder") and kind[0] is not None]
    for name in (family.denoiser, "vae", "scheduler", *texts):
        if Path(source).is_dir() and not (Path(source) / name).is_dir():
            raise OSError(f"it has no folder {name}, which every {family.pipeline} needs.")
    for name in (family.denoiser, "vae"):
        config[name] = PreTrainedConfig.get_config_dict(source, subfolder=name, **hub_kwargs)[0]
    config["scheduler"] = diffusers.DDPMScheduler.load_config(source, subfolder="scheduler", **hub_kwargs)
    return config


def encode_empty_prompt(source: str, decoder: Decoder, **hub_kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The empty prompt through the text encoders of a pipeline, in fp32: (1, L, E), and (1, P) or `None`."""
    with torch.device("meta"):
        given = decoder.build()
    pipeline_class = getattr(diffusers, decoder.pipeline)
    index = pipeline_class.load_config(source, **hub_kwargs)
    given |= {name: None for name, kind in index.items() if kind == [None, None]}  # such as a T5 that was left out
    pipeline = pipeline_class.from_pretrained(source, torch_dtype=torch.float32, **given, **hub_kwargs)
    with torch.no_grad():
        return decoder.encode_empty_prompt(pipeline)


def warn_if_distilled(source: str, config: dict) -> None:
    """Warns of a teacher that was distilled to a few steps."""
    found = [word for word in DISTILLED if word in Path(source).name.lower()]
    reasons = [f"its name says {found[0]!r}"] if found else []
    if config.get("is_distilled"):
        reasons.append("its model_index.json says is_distilled")
    if config["scheduler"].get("_class_name") in ("LCMScheduler", "TCDScheduler"):
        reasons.append(f"its scheduler is {config['scheduler']['_class_name']}")
    if reasons:
        logger.warning(
            f"{source} seems to be distilled to a few steps ({', '.join(reasons)}). Such a teacher no longer predicts "
            "the noise of an image at any timestep, which stage 1 compares with: take the model that it was distilled "
            "from."
        )


# ---- Florence-2 --------------------------------------------------------------------------------------------

# Microsoft's remote code gives the weights other names than transformers' own `Florence2Model`.
MICROSOFT_FLORENCE_KEYS = (
    (r"^image_projection$", "multi_modal_projector.image_projection.weight"),  # it is also transposed
    (r"^image_pos_embed\.", "multi_modal_projector.image_position_embed."),
    (r"^(image_proj_norm|visual_temporal_embed)\.", r"multi_modal_projector.\1."),
    (r"^(vision_tower\.convs\.\d+)\.proj\.", r"\1.conv."),
    (r"^(vision_tower\..+\.conv[12])\.fn\.dw\.", r"\1."),
    (r"^(vision_tower\..+)\.(?:window|channel)_attn\.norm\.", r"\1.norm1."),
    (r"^(vision_tower\..+\.(?:window|channel)_attn)\.fn\.", r"\1."),
    (r"^(vision_tower\..+)\.ffn\.norm\.", r"\1.norm2."),
    (r"^(vision_tower\..+\.ffn)\.fn\.net\.", r"\1."),
    (r"^language_model\.model\.", "language_model."),
)
# The names of the tied word embeddings. They are kept under the first.
FLORENCE_EMBEDDINGS = tuple(
    f"language_model.{name}.weight" for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
)


def load_florence(encoder: str, dtype: torch.dtype | str = "auto", **hub_kwargs) -> Florence2Model:
    """A Florence-2 in either layout, without its language head."""
    config = load_florence_config(encoder, **hub_kwargs)
    if not _is_microsofts(Florence2Config.get_config_dict(encoder, **hub_kwargs)[0]):
        return load_part(Florence2ForConditionalGeneration, encoder, dtype=dtype, **hub_kwargs).model
    find = functools.partial(cached_file, encoder, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if path := find("model.safetensors"):
        weights = load_file(path)
    elif path := find("pytorch_model.bin"):
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    else:
        raise OSError("there is neither a model.safetensors nor a pytorch_model.bin.")
    weights = {rename_florence_key(key): weight for key, weight in weights.items()}
    projection = "multi_modal_projector.image_projection.weight"
    weights[projection] = weights[projection].T.contiguous()
    # A file holds one or more of the tied copies, and the language head may be the only one.
    copies = [weights.pop(key) for key in (*FLORENCE_EMBEDDINGS, "language_model.lm_head.weight") if key in weights]
    if copies:
        weights[FLORENCE_EMBEDDINGS[0]] = copies[0]
    weights.pop("language_model.final_logits_bias", None)
    fit_florence_config(config, weights)
    dtype = weights[projection].dtype if dtype == "auto" else dtype
    return load_part(Florence2Model, None, config=config, state_dict=weights, dtype=dtype)


def load_florence_config(encoder: str, **hub_kwargs) -> Florence2Config:
    """The config of a Florence-2 in either layout, as transformers' own class understands it."""
    config, _ = Florence2Config.get_config_dict(encoder, **hub_kwargs)
    if config.get("model_type") != Florence2Config.model_type:
        raise ValueError(f"it is not a Florence-2: its config.json names the model type {config.get('model_type')!r}.")
    if not _is_microsofts(config):
        return Florence2Config.from_dict(config)
    vision = {**config["vision_config"], "model_type": Florence2VisionConfig.model_type}
    vision["embed_dim"] = vision.pop("dim_embed")
    vision["max_position_embeddings"] = vision.pop("image_pos_embed")["max_pos_embeddings"]
    vision["max_temporal_embeddings"] = vision.pop("visual_temporal_embedding")["max_temporal_embeddings"]
    return Florence2Config(vision_config=vision, text_config={**config["text_config"], "model_type": "bart"})


def fit_florence_config(config: Florence2Config, weights: Mapping[str, torch.Tensor]) -> None:
    """Takes the lengths of the tables from the weights, because some released configs give wrong lengths."""
    text, vision = config.text_config, config.vision_config
    text.vocab_size = len(weights[FLORENCE_EMBEDDINGS[0]])
    text.max_position_embeddings = len(weights["language_model.encoder.embed_positions.weight"]) - 2  # BART's offset
    projector = "multi_modal_projector."
    vision.max_position_embeddings = len(weights[projector + "image_position_embed.row_embeddings.weight"])
    vision.max_temporal_embeddings = len(weights[projector + "visual_temporal_embed.pos_idx_to_embed"])


def rename_florence_key(key: str) -> str:
    """The name in transformers' `Florence2Model` of a weight that Microsoft's remote code calls `key`."""
    for pattern, replacement in MICROSOFT_FLORENCE_KEYS:
        key = re.sub(pattern, replacement, key)
    return key


def _is_microsofts(config):
    return "dim_embed" in config.get("vision_config", {})
