"""VLV as vLLM runs it: our encoder makes the prefix of an image, and vLLM's own language model continues it."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedTokenizerBase
from vllm.config import VllmConfig
from vllm.config.multimodal import BaseDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptIndexTargets,
    PromptInsertion,
    PromptUpdate,
)
from vllm.sequence import IntermediateTensors

from configuration_vlv import VLVConfig
from layers_vlv import VLVProjection
from modeling_vlv import VLVForConditionalGeneration
from processing_vlv import VLVProcessor

TOWER = ("encoder.", "queries", "projection.", "text_encoder.")  # the checkpoint's weights that make the context


class _Info(BaseProcessingInfo):
    def get_hf_config(self) -> VLVConfig:
        return self.ctx.get_hf_config(VLVConfig)

    def get_hf_processor(self, **kwargs: object) -> VLVProcessor:
        return self.ctx.get_hf_processor(VLVProcessor, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": 1}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_hf_config().num_queries}


class _DummyInputs(BaseDummyInputsBuilder[_Info]):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, BaseDummyOptions]
    ) -> MultiModalDataDict:
        processor = self.info.get_hf_processor()
        number = mm_counts.get("image", 0)
        images = self._get_dummy_images(
            width=processor.image_width,
            height=processor.image_height,
            num_images=number,
            overrides=mm_options.get("image"),
        )
        return {"image": images}


class _Processor(BaseMultiModalProcessor[_Info]):
    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        images = hf_data.get("images") or []
        if images and all(isinstance(image, torch.Tensor) for image in images):  # `vlv caption` has prepared them
            return BatchFeature({"pixel_values": torch.stack(images)})
        return super()._call_hf_processor(hf_data, hf_kwargs)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        config = self.info.get_hf_config()
        place = placeholder_id(self.info.get_tokenizer(), config.caption_config.vocab_size)
        insertion = [place] * config.num_queries
        return [PromptInsertion(modality="image", target=PromptIndexTargets.start(), insertion=insertion)]


def placeholder_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """
    The token that stands for the image in a prompt. vLLM counts it as repeated text, and our own engine counts no
    image: it must be one that no caption holds, and above all not the one that ends captions.
    """
    if vocab_size > len(tokenizer):
        return vocab_size - 1  # the language model has more embeddings than there are tokens
    vocabulary = tokenizer.get_vocab()
    never_in_captions = (vocabulary.get(byte) for byte in ("Ā", "<0x00>"))  # byte 0, as tokenizers of bytes spell it
    found = [*never_in_captions, tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id]
    return next(number for number in found if number is not None)


@MULTIMODAL_REGISTRY.register_processor(_Processor, info=_Info, dummy_inputs=_DummyInputs)
class VLVForVllm(nn.Module, SupportsMultiModal, SupportsPP):
    """
    The captioner. UNet and VAE are not built and their weights are not read.

    Raises:
        ValueError: the checkpoint has no caption head.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={**{name: f"tower.{name}" for name in TOWER}, "unet.": None, "vae.": None}
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality == "image":
            return None  # an image needs no text in the prompt
        raise ValueError(f"VLV captions images, and takes no {modality}.")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: VLVConfig = vllm_config.model_config.hf_config
        head = config.caption_config
        if head is None:
            raise ValueError("This checkpoint has no caption head and cannot caption: train one, or take another.")
        self.config = config
        tower = copy.copy(config)
        tower.caption_config = None
        width = config.text_encoder_config.hidden_size
        with self._mark_tower_model(vllm_config, "image"):
            self.tower = VLVForConditionalGeneration(tower).eval()
            self.prefix_projection = VLVProjection(width, head.hidden_size)
        # vLLM copies this from the whole model's config into the head's. Only the head's own value is true of it: with
        # another one its `lm_head` would stay unloaded, and captions would be empty, without an error.
        config.tie_word_embeddings = head.tie_word_embeddings
        with self._mark_language_model(vllm_config):
            self.caption_head = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=head, prefix=maybe_prefix(prefix, "caption_head")
            )
        self.make_empty_intermediate_tensors = self.caption_head.make_empty_intermediate_tensors

    def embed_multimodal(self, pixel_values: torch.Tensor | None = None, **kwargs: object) -> MultiModalEmbeddings:
        """`pixel_values` (B, 3, H, W) -> the prefixes (B, Q, L) of the images."""
        if pixel_values is None:
            return []
        context = self.tower.encode_context(self.tower.encode(pixel_values))
        return self.prefix_projection(context.to(self.prefix_projection[0].weight))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.caption_head.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.caption_head.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
