"""For vLLM: captions of a model that never learnt to end stop where they repeat themselves, as our own engine's do."""

import torch
from transformers import GenerationConfig
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, RequestLogitsProcessor

from stopping_vlv import RepeatedSentence


class StopAtRepetition(AdapterLogitsProcessor):
    """
    Ends a caption behind its first repeated sentence. It does nothing for a checkpoint whose captions end by
    themselves. `vllm serve` takes it as `--logits-processors vlv.serving.vllm_stopping:StopAtRepetition`.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        super().__init__(vllm_config, device, is_pin_memory)
        config = GenerationConfig.from_pretrained(vllm_config.model_config.model)
        self.repetition = RepeatedSentence.of(config)
        ends = config.eos_token_id
        self.end = ends[0] if isinstance(ends, list) else ends

    def is_argmax_invariant(self) -> bool:
        return self.repetition is None

    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        return None if self.repetition is None or self.end is None else self._end_where_repeated

    def _end_where_repeated(self, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if output_ids and output_ids[-1] in self.repetition.sentence_end_ids and self.repetition.find(output_ids):
            logits.fill_(-torch.inf)
            logits[self.end] = 0.0
        return logits
