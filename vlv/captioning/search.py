"""Greedy search that drops finished captions from the batch."""

from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList


@torch.no_grad()
def shrinking_search(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    **model_kwargs: Any,
) -> torch.LongTensor:
    """
    For `generate(custom_generate=...)`. It writes the same tokens as the greedy search of `generate`, but a finished
    caption leaves the batch and costs nothing more. The search of `generate` computes it until the last one is done.

    A logits processor that holds a state for each row has a method `keep(rows)`, which receives the remaining rows.

    Args:
        model_kwargs: `inputs_embeds` (B, length, width) from `generate`, and its `attention_mask` (B, length) where it
            is padded, which it is on the left.

    Returns:
        Token ids `(B, T)`, with zeros after the token that ended a caption.
    """
    rows = torch.arange(len(input_ids), device=input_ids.device)  # the captions that are not finished
    written = input_ids.new_zeros(len(input_ids), stopping_criteria.max_length)
    cache = DynamicCache(config=model.config)
    inputs = {"inputs_embeds": model_kwargs["inputs_embeds"]}
    mask = model_kwargs.get("attention_mask")
    if mask is not None and mask.all():  # without padding the model needs neither mask nor positions
        mask = None
    while True:
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, input_ids.shape[1] and -1 :]
            inputs |= {"attention_mask": mask, "position_ids": positions}
        outputs = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        tokens = logits_processor(input_ids, logits).argmax(-1)
        written[rows, input_ids.shape[1]] = tokens
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        left = (~stopping_criteria(input_ids, None)).nonzero()[:, 0]
        if len(left) == 0:
            return written[:, : input_ids.shape[1]]
        if len(left) < len(rows):
            rows, input_ids, tokens = rows[left], input_ids[left], tokens[left]
            cache.batch_select_indices(left)
            mask = None if mask is None else mask[left]
            for processor in logits_processor:
                if hasattr(processor, "keep"):
                    processor.keep(left)
        inputs = {"input_ids": tokens[:, None]}
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
