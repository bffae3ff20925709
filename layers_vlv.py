"""VLV's own layers around the pretrained parts, and the checks and moves of the tensors that enter a part."""

import math
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel, Florence2Config, Florence2VisionConfig
from transformers.utils.generic import is_flash_attention_requested


class VLVProjection(torch.nn.Sequential):
    """Linear, GELU, Linear: from the width of one part to the width of the next, which is also the inner one."""

    def __init__(self, in_features: int, out_features: int, inner_features: int | None = None):
        inner_features = inner_features or out_features
        super().__init__(
            torch.nn.Linear(in_features, inner_features),
            torch.nn.GELU(),
            torch.nn.Linear(inner_features, out_features),
        )


class VLVTextEncoder(torch.nn.Module):
    """
    CLIP's text encoder, which also takes embeddings instead of token ids.

    It holds CLIP's modules directly. `CLIPTextModel` prefixes their weights differently in different releases of
    transformers 5, and a checkpoint must load in all of them.
    """

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        clip = CLIPTextModel(config)
        clip = getattr(clip, "text_model", clip)
        self.embeddings, self.encoder, self.final_layer_norm = clip.embeddings, clip.encoder, clip.final_layer_norm
        del self.embeddings.position_ids  # not part of a checkpoint: forward() makes its own

    def forward(
        self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`input_ids` (B, Q), or `inputs_embeds` (B, Q, E) without positions -> context (B, Q, E)."""
        inputs = inputs_embeds if input_ids is None else input_ids
        length = inputs.shape[1]
        position_ids = torch.arange(length, device=inputs.device)[None]
        hidden_states = self.embeddings(input_ids, position_ids, inputs_embeds)
        mask, attention = None, self.config._attn_implementation
        if attention == "flex_attention":
            mask = create_block_mask(
                lambda b, h, query, key: query >= key, None, None, length, length, hidden_states.device
            )
        elif attention != "sdpa" and not is_flash_attention_requested(self.config):  # those two read is_causal
            mask = torch.full((length, length), torch.finfo(hidden_states.dtype).min, device=hidden_states.device)
            mask = mask.to(hidden_states.dtype).triu(1)[None, None]
        hidden_states = self.encoder(inputs_embeds=hidden_states, attention_mask=mask, is_causal=True)[0]
        return self.final_layer_norm(hidden_states)


# ---- tensors that enter a part -----------------------------------------------------------------------------


def device_of(module: torch.nn.Module) -> torch.device | None:
    """The device that a module reads its inputs on. An offloaded module gives `None`: its hooks move its inputs."""
    weight = next(module.parameters())
    return None if weight.is_meta else weight.device


def cast_for(module: torch.nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the device and in the dtype of the module that reads it."""
    return tensor.to(device_of(module), next(module.parameters()).dtype)


def check_images(name: str, images: torch.Tensor, source: str) -> None:
    """Raises ValueError unless `images` are floats (B, 3, height, width). `source` says where to get such images."""
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"{name} are a {type(images).__name__}: expected a tensor {source}.")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
        raise ValueError(
            f"{name} are {tuple(images.shape)} {images.dtype}: expected floats of shape (batch, 3, height, width) "
            f"{source}."
        )


def check_pixels(pixel_values: torch.Tensor | None, vision_config: Florence2VisionConfig) -> None:
    """Raises ValueError unless `pixel_values` are images that the processor made for this encoder."""
    if pixel_values is None:
        raise ValueError("Nothing to encode: give pixel_values, image_features or caption_embeds.")
    check_images("pixel_values", pixel_values, "from the processor")
    if not torch.compiler.is_compiling() and not pixel_values.abs().amax() <= 20:  # `not <=` also finds NaN
        raise ValueError(
            "pixel_values are not normalised (values beyond 20) or not finite: take them from the processor."
        )
    limit = math.prod(vision_config.patch_stride) * vision_config.max_position_embeddings
    if max(pixel_values.shape[2:]) > limit:
        raise ValueError(
            f"pixel_values are {pixel_values.shape[2]}x{pixel_values.shape[3]} pixels, but the encoder has positions "
            f"for {limit}: resize the images with the processor."
        )


def check_encoder_size(size: int, config: Florence2Config, name: str = "encoder_image_size") -> None:
    """
    Raises ValueError unless a Florence-2 can read square images of this many pixels a side: its strides divide them,
    and both its tables reach, that of rows and columns and that of the language model's positions. `name` is what the
    message calls the size.
    """
    vision = config.vision_config
    cell = math.prod(vision.patch_stride)
    tokens = config.text_config.max_position_embeddings - 1  # one more stands for the whole image
    largest = cell * min(vision.max_position_embeddings, math.isqrt(tokens))
    if size % cell or not cell <= size <= largest:
        raise ValueError(
            f"{name} is {size}, but the encoder reads multiples of {cell} pixels, its strides, up to "
            f"{largest}, which its positions reach: choose one of them, such as "
            f"{min(largest, max(cell, cell * round(size / cell)))}."
        )


def check_batch(context: torch.Tensor, **inputs: torch.Tensor | None) -> None:
    """Raises ValueError unless each input has one row per image."""
    for name, tensor in inputs.items():
        if tensor is not None and tensor.shape[0] != context.shape[0]:
            raise ValueError(
                f"There are {len(context)} images, but {len(tensor)} rows of {name}: each image needs its own."
            )


def check_length(num_queries: int | None, available: int, owner: str) -> int:
    """How many leading queries to read, all of them by default; raises ValueError where there are not so many."""
    if num_queries is None:
        return available
    is_whole = isinstance(num_queries, Integral) and not isinstance(num_queries, bool)
    if not is_whole or not 1 <= num_queries <= available:
        raise ValueError(f"num_queries is {num_queries!r}, but {owner}: choose between 1 and {available}.")
    return num_queries


# ---- tables: what a checkpoint does not hold of diffusers' modules -------------------------------------------


def restore_tables(module: torch.nn.Module, build: Callable[[], torch.nn.Module]) -> None:
    """
    Computes the tables of a loaded module again: buffers that are not saved, and tensors that are plain attributes.
    transformers leaves the former uninitialised and the latter on the meta device, without an error. `build` makes the
    module again; its weights are not allocated.
    """
    if next(_tables(module), None) is None:
        return
    with torch.device("cpu"), _NoWeights():
        fresh = build()
    for (owner, name, table), (_, _, right) in zip(_tables(module), _tables(fresh), strict=True):
        if name in owner._buffers:
            table.copy_(right)
        else:
            setattr(owner, name, right)


def _tables(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, Any]]:
    """Owner, name and value of each: a buffer, a tensor, or a list of tensors."""
    for owner in module.modules():
        for name in sorted(owner._non_persistent_buffers_set):
            if owner._buffers[name] is not None:
                yield owner, name, owner._buffers[name]
        for name, value in sorted(vars(owner).items()):
            if isinstance(value, torch.Tensor) or (
                isinstance(value, (list, tuple)) and value and all(isinstance(one, torch.Tensor) for one in value)
            ):
                yield owner, name, value


class _NoWeights(TorchFunctionMode):
    """Layers allocate their weights with `torch.empty`. Here that allocates nothing, and all else is computed."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)
