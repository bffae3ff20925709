"""
Floating-point operations of training and use, by part, at a size that no machine here has to hold.

    python -m benchmarks.flops [--caption_head 3B] [--model FOLDER --encoder_image_size 768] [--tokens 90]
        [--utilisation 0.4] [--price 2.5] [--peak 989] [--output benchmarks/results/flops.json]

Without --model, the paper's size: Florence-2-large, Stable Diffusion 2.1-base and a Qwen2.5. With it, the config of
any VLV. The model is built on the meta device, where a tensor has a shape and no numbers. Its own code runs there,
also backward, and torch's FlopCounterMode counts matrix products, convolutions and attention: two operations for a
multiplication with its addition. Attention is counted whole, even if a mask hides half of it. The cost is that of a
GPU of --peak TFLOP/s (dense, bf16; 989 is an H100's) at a --utilisation, for --price dollars an hour: 200,000 batches
of 512 images in stage 1, 100,000 batches of 64 captions in stage 2.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from configuration_vlv import VLVConfig
from modeling_vlv import VLVModel
from vlv import cli, find_bundled
from vlv.files import atomic_writer
from vlv.models.loading import read_config
from vlv.models.published import CAPTION_HEADS, published_config
from vlv.provenance import git_commit
from vlv.training.muon import matrices_of, orthogonal

STAGE_1_SAMPLES, STAGE_2_CAPTIONS = 200_000 * 512, 100_000 * 64
LONGEST = 300  # tokens, to which the paper pads its captions
BYTES = 2  # of a weight or a cached key, in bf16
META = torch.device("meta")
# Arguments that the record repeats.
COUNTED = ("model", "caption_head", "encoder_image_size", "tokens", "utilisation", "price", "peak")

Parts = dict[str, float]  # operations by part


class MetaScalars(TorchDispatchMode):
    """Answers checks of values, which tensors without numbers cannot, as a check that passes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        return func(*args, **(kwargs or {}))


def count(work: Callable[[], torch.Tensor | None]) -> tuple[float, torch.Tensor | None]:
    """The operations of some work on the meta device, and what it returns."""
    counter = FlopCounterMode(display=False)
    with MetaScalars(), counter:
        result = work()
    return counter.get_total_flops(), result


def build(config: VLVConfig) -> VLVModel:
    with META:
        return VLVModel(config)


@dataclass(frozen=True)
class Stage1:
    """
    How stage 1 is trained.

    Args:
        encoder_size: pixels of a side that the encoder reads.
        noise_draws: noise levels for each encoded image.
        cached: image features and latents are read from the disk.
        checkpointing: the denoiser runs forward twice, to save memory.
        num_queries: leading queries of those that the model has.
        muon_batch: images of a step on one device, if Muon trains the matrices; each image bears its share of Muon's
            operations. Every device computes all of them.
    """

    encoder_size: int = 768
    noise_draws: int = 1
    cached: bool = False
    checkpointing: bool = False
    num_queries: int | None = None
    muon_batch: int | None = None


@dataclass(frozen=True)
class Stage2:
    """
    How stage 2 is trained.

    Args:
        encoder_size: as above.
        tokens: of a caption, its padding included.
        trains_encoder: Florence's language model trains along, as the paper does it.
        cached: caption embeddings are read from the disk.
        lora: the caption head is trained through adapters of rank 16.
    """

    encoder_size: int = 768
    tokens: int = LONGEST
    trains_encoder: bool = False
    cached: bool = False
    lora: bool = False


# ---- what is counted ---------------------------------------------------------------------------------------


class Counter:
    """Counts parts one after the other. Each starts from the output of the one before it, without its history."""

    def __init__(self) -> None:
        self.parts: Parts = {}

    def frozen(self, name: str, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            self.parts[name], result = count(work)
        return result

    def trained(self, name: str, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Of work whose gradient is needed; its result needs one again."""
        forward, result = count(work)
        backward, _ = count(lambda: result.backward(torch.ones_like(result)))
        self.parts |= {name: forward, f"{name}, backward": backward}
        return result.detach().requires_grad_()


def pixels(size: int) -> torch.Tensor:
    return torch.empty(1, 3, size, size, device=META)


def image_size(model: VLVModel) -> int:
    return model.config.image_size or model.teacher.image_size


def stage_1(config: VLVConfig, how: Stage1) -> Parts:
    """Operations for each image, of which `noise_draws` denoising samples are made."""
    config = copy.deepcopy(config)
    config.caption_config, config.noise_draws = None, how.noise_draws
    model = build(config).set_stage("autoencode").train()
    if how.checkpointing:
        model.gradient_checkpointing_enable(parts=[model.teacher.denoiser])
    counter = Counter()
    with torch.no_grad():
        _, features = count(lambda: model.get_image_features(pixels(how.encoder_size)))
        _, latents = count(lambda: model.encode_latents(pixels(image_size(model))))
    if not how.cached:
        counter.frozen("vision tower", lambda: model.get_image_features(pixels(how.encoder_size)))
        counter.frozen("VAE", lambda: model.encode_latents(pixels(image_size(model))))
    asked = {"image_features": features, "num_queries": how.num_queries}
    embeds = counter.trained("Florence's language model", lambda: model.encode(**asked))
    if model.text_encoder is not None:
        embeds = counter.trained("text encoder", lambda: model.encode_context(embeds))
    counter.trained("denoiser", lambda: model.compute_denoising_loss(latents, embeds))
    if how.muon_batch is not None:
        counter.parts["Muon"] = muon_step(model) / how.muon_batch
    return counter.parts


def muon_step(model: VLVModel) -> float:
    """Operations of one step of Muon."""
    operations, _ = count(lambda: [orthogonal(matrix.flatten(1)) for matrix in matrices_of(model)])
    return operations


def stage_2(config: VLVConfig, how: Stage2) -> Parts:
    """Operations for each caption."""
    config = copy.deepcopy(config)
    config.decoder_config = None
    model = build(config)
    train = ["prefix_projection", "caption_head", *(["language_model"] if how.trains_encoder else [])]
    model.set_stage("caption", train=train).train()
    if how.lora:
        model.caption_head.requires_grad_(False)
        model.caption_head.add_adapter(LoraConfig(r=16, target_modules="all-linear"))
    counter = Counter()
    embeds = torch.empty(1, config.num_queries, config.caption_embeds_width, device=META)
    if not how.cached:
        features = counter.frozen("vision tower", lambda: model.get_image_features(pixels(how.encoder_size)))
        part = counter.trained if how.trains_encoder else counter.frozen
        embeds = part("Florence's language model", lambda: model.encode(image_features=features))
    if model.text_encoder is not None:
        part = counter.trained if how.trains_encoder else counter.frozen
        embeds = part("text encoder", lambda: model.encode_context(embeds))
    counter.trained("caption head", lambda: caption_loss(model, embeds, how.tokens))
    return counter.parts


def caption_loss(model: VLVModel, context: torch.Tensor, tokens: int) -> torch.Tensor:
    """What the model's forward makes of a context, its text encoder having run."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=META)
    embeds, mask = model._caption_inputs(context, ids)
    logits = model.caption_head(inputs_embeds=embeds, attention_mask=mask, logits_to_keep=tokens + 1).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0])


@torch.no_grad()
def captioning(config: VLVConfig, encoder_size: int, tokens: int, num_queries: int | None = None) -> Parts:
    """Operations to caption one image with so many tokens, greedily."""
    config = copy.deepcopy(config)
    config.decoder_config = None
    model, counter = build(config).eval(), Counter()
    embeds = encoded(model, counter, encoder_size, num_queries)
    prefix = counter.frozen("prefix projection", lambda: model.prefix_projection(embeds))
    written: list = []
    counter.frozen("caption head, prefix", lambda: written.append(head_step(model, prefix)))
    cache, each = written[0].past_key_values, []
    word = torch.empty(1, 1, prefix.shape[-1], device=META)
    for _ in range(2):  # one more key in the cache costs the same at any length
        each.append(count(lambda: written.append(head_step(model, word, cache)))[0])
    steps = tokens - 1  # the prefix gives the first token
    counter.parts["caption head, tokens"] = steps * each[0] + (each[1] - each[0]) * steps * (steps - 1) / 2
    return counter.parts


def head_step(model, embeds, cache=None):
    return model.caption_head(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def reconstruction(
    config: VLVConfig, encoder_size: int, steps: int, guidance: bool, num_queries: int | None = None
) -> Parts:
    """Operations to rebuild one image."""
    config = copy.deepcopy(config)
    config.caption_config = None
    model, counter = build(config).eval(), Counter()
    embeds = encoded(model, counter, encoder_size, num_queries)
    _, latents = count(lambda: model.encode_latents(pixels(image_size(model))))
    time = torch.zeros(1, dtype=torch.long, device=META)
    counter.frozen("denoiser", lambda: model.denoise(latents, time, embeds))
    counter.parts["denoiser"] *= steps * (2 if guidance else 1)
    counter.frozen("VAE", lambda: model.decode_latents(latents))
    return counter.parts


def encoded(model, counter, encoder_size, num_queries):
    """The context of an image, each part counted."""
    asked = {"num_queries": num_queries}
    asked["image_features"] = counter.frozen("vision tower", lambda: model.get_image_features(pixels(encoder_size)))
    embeds = counter.frozen("Florence's language model", lambda: model.encode(**asked))
    if model.text_encoder is None:
        return embeds
    return counter.frozen("text encoder", lambda: model.encode_context(embeds))


def caption_traffic(config: VLVConfig, tokens: int, batch: int, num_queries: int | None = None) -> Parts:
    """
    Bytes read from memory for each image of a batch, in bf16: every weight once a forward pass, and the keys and
    values of all that was written before, once a token. Activations are left out.
    """
    config = copy.deepcopy(config)
    config.decoder_config = None
    model = build(config)
    named = {
        "vision tower": model.encoder.vision_tower,
        "Florence's language model": model.encoder.language_model,
        "text encoder": model.text_encoder,
    }
    parts = {name: BYTES * weights(part) / batch for name, part in named.items() if part is not None}
    head = config.caption_config
    width = getattr(head, "head_dim", None) or head.hidden_size // head.num_attention_heads
    key = 2 * BYTES * head.num_hidden_layers * head.num_key_value_heads * width
    queries = num_queries or config.num_queries
    parts["caption head's weights"] = tokens * BYTES * weights(model.caption_head) / batch
    parts["caption head's cache"] = sum(key * (queries + step) for step in range(tokens))
    return parts


def weights(module: torch.nn.Module) -> int:
    """Of a part, those that a forward pass reads: an embedding that is no output layer too is looked up by the row."""
    output = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    tied = output.weight if output is not None else None
    tables = {id(one.weight) for one in module.modules() if isinstance(one, torch.nn.Embedding)}
    return sum(one.numel() for one in module.parameters() if one is tied or id(one) not in tables)


# ---- the table ---------------------------------------------------------------------------------------------


def stage_1_ways(size: int, queries: int) -> dict[str, Stage1]:
    """The paper's way, then what is changed: one thing more in each row that begins with a plus."""
    half, two_thirds = size // 2, 2 * size // 3
    return {
        "paper": Stage1(size, checkpointing=True),
        f"paper, encoder at {two_thirds} pixels": Stage1(two_thirds, checkpointing=True),
        f"paper, encoder at {half} pixels": Stage1(half, checkpointing=True),
        "paper, features and latents cached": Stage1(size, cached=True, checkpointing=True),
        "without gradient checkpointing": Stage1(size),
        "+ 4 noise draws for each image": Stage1(size, noise_draws=4),
        f"+ encoder at {half} pixels": Stage1(half, noise_draws=4),
        "+ 8 noise draws": Stage1(half, noise_draws=8),
        "+ Muon, 16 images a step on each GPU": Stage1(half, noise_draws=8, muon_batch=16),
        f"+ {queries // 4} queries of {queries}": Stage1(half, noise_draws=8, num_queries=queries // 4, muon_batch=16),
    }


def stage_2_ways(size: int, tokens: int) -> dict[str, Stage2]:
    half = size // 2
    return {
        "paper": Stage2(size, trains_encoder=True),
        "captions without padding": Stage2(size, tokens, trains_encoder=True),
        "+ encoder frozen": Stage2(size, tokens),
        f"+ encoder at {half} pixels": Stage2(half, tokens),
        "+ LoRA": Stage2(half, tokens, lora=True),
        "embeddings cached, without LoRA": Stage2(half, tokens, cached=True),
    }


def per_unit(how: Stage1 | Stage2, parts: Parts) -> float:
    """Operations for each denoising sample, or each caption."""
    return sum(parts.values()) / (how.noise_draws if isinstance(how, Stage1) else 1)


def rows(ways: dict, measure: Callable, units: int, per_hour: float, price: float) -> list[dict]:
    """
    Args:
        units: denoising samples, or captions, of a whole training.
        per_hour: operations that a device does in an hour.
    """
    found = []
    for name, how in ways.items():
        parts = measure(how)
        each = per_unit(how, parts)
        hours = units * each / per_hour
        found.append(
            {"way": name, **asdict(how), "parts": parts, "each": each, "hours": hours, "dollars": hours * price}
        )
    return found


def record(config: VLVConfig, arguments: argparse.Namespace) -> dict:
    per_hour = arguments.utilisation * arguments.peak * 1e12 * 3600
    shared = {"per_hour": per_hour, "price": arguments.price}
    tokens, size, queries = arguments.tokens, arguments.encoder_image_size, config.num_queries
    half, few = size // 2, queries // 4
    found = {
        "stage 1": rows(stage_1_ways(size, queries), lambda how: stage_1(config, how), STAGE_1_SAMPLES, **shared),
        "stage 2": rows(stage_2_ways(size, tokens), lambda how: stage_2(config, how), STAGE_2_CAPTIONS, **shared),
        "captioning": [
            {"way": f"{side} pixels, {number} queries", "parts": captioning(config, side, tokens, number)}
            for side, number in ((size, queries), (half, queries), (half, few))
        ],
        "traffic": [
            {"way": f"batch {batch}, {number} queries", "parts": caption_traffic(config, tokens, batch, number)}
            for batch, number in ((1, queries), (64, queries), (64, few))
        ],
        "reconstruction": [
            {"way": name, "parts": reconstruction(config, size, steps, guidance, number)}
            for name, steps, guidance, number in (
                ("paper: 50 steps, guidance", 50, True, queries),
                ("8 steps, guidance", 8, True, queries),
                ("8 steps, no guidance", 8, False, queries),
                (f"8 steps, no guidance, {few} queries", 8, False, few),
            )
        ],
    }
    return {
        "benchmark": "flops",
        **{name: getattr(arguments, name) for name in COUNTED},
        "operations": found,
        "versions": {name: version(name) for name in ("torch", "transformers", "diffusers")},
        "commit": git_commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caption_head", choices=CAPTION_HEADS, default="3B")
    parser.add_argument("--model", help="folder or Hub id of a VLV, whose config is counted in place of the paper's")
    parser.add_argument("--encoder_image_size", type=int, default=768, help="pixels of a side that the encoder reads")
    parser.add_argument("--tokens", type=int, default=90, help="of a caption")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that a training reaches")
    parser.add_argument("--price", type=float, default=2.5, help="dollars for an hour of one device")
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of one device")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    source = arguments.model and find_bundled(arguments.model)
    config = read_config(source) if source else published_config(arguments.caption_head)
    if config.caption_config is None or config.decoder_config is None:
        raise SystemExit(f"{arguments.model} lacks a caption head or a decoder: count a model that has both.")
    found = record(config, arguments)
    for stage, ways in found["operations"].items():
        print(f"\n{stage}")
        for row in ways:
            each = row.get("each", sum(row["parts"].values()))
            cost = f"{row['hours']:9.1f} h {row['dollars']:7.0f} $" if "hours" in row else ""
            print(f"  {row['way']:40} {each / 1e12:7.3f} T {cost}")
            for part, operations in row["parts"].items():
                print(f"      {part:40} {operations / 1e12:7.3f}")
    if arguments.output is not None:
        with atomic_writer(arguments.output) as file:
            file.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(cli.run("python -m benchmarks.flops", main, is_process=True))
