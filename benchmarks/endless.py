"""A stage 2 with the paper's flaw: no caption's end is learnt. `stopping.py` trains with it."""

from vlv.training.caption import CaptionStage


class EndlessStage(CaptionStage):
    def collate(self, batch):
        collated = super().collate(batch)
        end = self.processor.tokenizer.eos_token_id
        collated["labels"] = collated["labels"].masked_fill(collated["labels"] == end, -100)
        return collated
