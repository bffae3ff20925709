"""Stage `caption` (stage 2): the language model learns to write captions from caption embeddings."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForCausalLM, TrainingArguments

from modeling_vlv import VLVForConditionalGeneration, VLVModel, VLVOutput
from processing_vlv import VLVProcessor
from stopping_vlv import stop_at_repetition
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.data.rows import captions_of
from vlv.models.loading import read_config
from vlv.training.examples import draw_captions, merge
from vlv.training.lora import LoraSettings, add_adapters, merge_adapters
from vlv.training.samples import markdown_table
from vlv.training.vlv_settings import VLVSettings
from vlv.training.vlv_stage import VLVStage


@dataclass
class CaptionSettings(LoraSettings, VLVSettings):
    caption_head: str | None = field(
        default=None, metadata={"help": "Folder or id of a language model, if --model has no caption head yet."}
    )
    max_length: int = field(default=300, metadata={"help": "Longest caption in tokens; longer ones are cut."})


class CaptionStage(VLVStage):
    Settings = CaptionSettings
    stage = "caption"
    image_inputs = ("pixel_values",)
    reads_captions = True
    smooths_labels = True

    def __init__(self, settings: CaptionSettings, args: TrainingArguments):
        super().__init__(settings, args)
        if settings.model is None:
            raise ValueError("Stage 2 starts from a stage-1 model: give its folder with --model.")
        if settings.caption_head is None and read_config(self.source).caption_config is None:
            raise ValueError(f"{self.source} has no caption head yet: name a language model with --caption_head.")
        self.model, self.processor = self.load(VLVForConditionalGeneration)
        self.choose_parts()
        if settings.lora_rank is not None:
            add_adapters(self.model, self.train_parts, settings)
        if args.use_liger_kernel:
            self.use_liger_kernels()

    def prepare(self) -> None:
        features = {"cache_features": self.features()}
        self.prepare_data(train=features, evaluation=features)

    def load(self, model_class: type[VLVModel]) -> tuple[VLVModel, VLVProcessor]:
        """The model to start from. It gets a new caption head if it has none, and here learns to end its captions."""
        settings = self.settings
        processor = VLVProcessor.from_pretrained(self.source)
        if settings.caption_head is None:
            model = self.load_model(model_class)
        else:
            head = AutoModelForCausalLM.from_pretrained(settings.caption_head, dtype=torch.float32)
            model = self.load_model(model_class, caption_config=head.config)
            model.caption_head.load_state_dict(head.state_dict())
            model.generation_config = head.generation_config
            processor.tokenizer = type(processor.tokenizer).from_pretrained(settings.caption_head)
        stop_at_repetition(model, processor, on=False)
        return model, processor

    def use_liger_kernels(self) -> None:
        """Trainer would look for kernels for a VLV, and there are none. The caption head has some."""
        try:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance
        except ImportError as error:
            raise ValueError("use_liger_kernel needs the package liger-kernel, which is not installed.") from error
        _apply_liger_kernel_to_instance(model=self.model.caption_head, **(self.args.liger_kernel_config or {}))

    def collate(self, batch: dict[str, Any] | list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One caption of each image, padded to the longest caption of the batch."""
        batch = batch if isinstance(batch, dict) else merge(batch)
        text = self.processor(text=draw_captions(batch), return_labels=True, max_length=self.settings.max_length)
        return {**super().collate(batch), **text}

    def loss_function(self) -> Callable[..., torch.Tensor] | None:
        # Trainer's own label smoother would compare the labels with logits of other positions.
        return self.smoothed_loss if self.args.label_smoothing_factor else None

    def smoothed_loss(
        self, outputs: VLVOutput, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Cross-entropy of the caption tokens with smoothed labels: the mean over all tokens of the step."""
        logits = outputs["logits"][:, :-1]  # the last position predicts the token after the caption
        count = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        labels = labels.to(logits.device)
        smoothing = self.args.label_smoothing_factor
        loss = cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", label_smoothing=smoothing
        )
        return loss / count

    def lengths(self) -> list[int]:
        # Lengths are counted in bytes, which is cheap. Lengths in tokens would give nearly the same order.
        captions = self.train_dataset.rows[self.settings.caption_column][:]
        return [max(len(caption.encode()) for caption in captions_of(value)) for value in captions]

    def samples(self) -> str:
        rows, _, pixel_values = self.sample_rows()
        truths = [captions_of(row[self.settings.caption_column])[0] for row in rows]
        length = self.processor(text=truths)["input_ids"].shape[1] + 8
        captioner = Captioner(self.model.eval(), self.processor, Decoding(max_new_tokens=length), len(rows))
        written = [best.text for best, *_ in captioner(range(len(rows)), pixel_values)]
        return markdown_table(("written", "true"), list(zip(written, truths, strict=True)))

    @torch.no_grad()
    def whole(self) -> VLVModel:
        """
        The trained model, with the decoder of the model that it started from; this stage does not load the decoder.
        With adapters that are not merged, it is the base model of the adapters.
        """
        model, _ = self.load(VLVModel)
        if self.settings.lora_rank is not None:
            return merge_adapters(model, self.model) if self.settings.merge_lora else model
        weights = dict(model.named_parameters())
        for name, trained in self.trained().items():
            weights[name].copy_(trained)
        return model

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self.settings.lora_rank is not None and not self.settings.merge_lora:
            self.model.save_pretrained(folder)  # only the adapters; loading the folder adds them to the model

    @torch.inference_mode()
    def evaluate(self, num: int = 500) -> dict[str, float]:
        """Shares of the evaluation captions that greedy search writes exactly, and that end by themselves."""
        model, right, ended, total = self.model.eval(), 0, 0, 0
        rows = Subset(self.eval_dataset, range(min(num, len(self.eval_dataset))))
        for batch in DataLoader(rows, batch_size=100, collate_fn=self.collate):
            truth = self.processor.batch_decode(batch["input_ids"])
            length = batch["input_ids"].shape[1] + 8
            if "caption_embeds" not in batch:
                image = {name: batch[name] for name in ("pixel_values", "image_features") if name in batch}
                batch["caption_embeds"] = model.encode(**image)
            captioner = Captioner(model, self.processor, Decoding(max_new_tokens=length), len(truth))
            written = [best for best, *_ in captioner.write(truth, batch["caption_embeds"])]
            right += sum(said.text == true for said, true in zip(written, truth, strict=True))
            ended += sum(said.ended for said in written)
            total += len(written)
        return {"exact_captions": right / total, "ended": ended / total}
