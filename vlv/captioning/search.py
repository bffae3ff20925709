"""Greedy search in which captions that have ended leave the batch."""

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
    For `generate(custom_generate=...)`: writes the same tokens as its own greedy search, but a caption that has ended
    costs nothing from there on, where that would go on with it until the last one has ended.

    A logits processor that knows of single rows has a method `keep(rows)`, which is told the rows that are left.

    Args:
        model_kwargs: from `generate`, `inputs_embeds` (B, length, width): all of one length, as nothing is padded.

    Returns:
        Token ids `(B, T)`, filled up with zeros behind what ended a caption.
    """
    rows = torch.arange(len(input_ids), device=input_ids.device)  # of the batch that are still being written
    written = input_ids.new_zeros(len(input_ids), stopping_criteria.max_length)
    cache = DynamicCache(config=model.config)
    inputs = {"inputs_embeds": model_kwargs["inputs_embeds"]}
    while True:
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
            for processor in logits_processor:
                if hasattr(processor, "keep"):
                    processor.keep(left)
        inputs = {"input_ids": tokens[:, None]}
