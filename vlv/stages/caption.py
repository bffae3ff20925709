"""Stage `caption` (stage 2): the language model learns to write the caption embeddings down."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from modeling_vlv import VLVForConditionalGeneration, VLVModel
from processing_vlv import VLVProcessor
from vlv.data import Table, captions_of, require_column
from vlv.loading import read_config
from vlv.lora import LoraSettings, add_adapters, merge_adapters
from vlv.monitor import markdown_table
from vlv.stages.vlv import Images, VLVSettings, VLVStage


@dataclass
class CaptionSettings(LoraSettings, VLVSettings):
    caption_head: str | None = field(
        default=None, metadata={"help": "Folder or id of a language model, where --model has no caption head yet."}
    )
    max_length: int = field(default=300, metadata={"help": "Longest caption in tokens; longer ones are cut."})


class CaptionedImages(torch.utils.data.Dataset):
    """Images and their captions, for when the encoder's vision tower trains and nothing can be cached."""

    def __init__(self, images: Images, captions: Table):
        self.images, self.captions = images, captions

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self.images[index], **self.captions[index]}


class CaptionStage(VLVStage):
    Settings = CaptionSettings
    stage = "caption"

    def __init__(self, settings: CaptionSettings, args: TrainingArguments):
        super().__init__(settings, args)
        if settings.model is None:
            raise ValueError("Stage 2 goes on from a stage-1 model: give its folder with --model.")
        if settings.caption_head is None and read_config(self.source).caption_config is None:
            raise ValueError(f"{self.source} has no caption head yet: name a language model with --caption_head.")
        self.model, self.processor = self.load(VLVForConditionalGeneration)
        self.choose_parts()
        if settings.lora_rank is not None:
            add_adapters(self.model, self.train_parts, settings)
        if args.use_liger_kernel:
            self.use_liger_kernels()
        train, self.eval_rows = self.load_data()
        require_column(train, settings.caption_column, "caption_column")
        self.train_dataset = self.captioned(train, "Encoding images")
        self.eval_dataset = self.captioned(self.eval_rows, "Encoding evaluation images")

    def load(self, model_class: type[VLVModel]) -> tuple[VLVModel, VLVProcessor]:
        """The model to go on from, with a new caption head where it has none."""
        settings = self.settings
        processor = VLVProcessor.from_pretrained(self.source)
        if settings.caption_head is None:
            return self.load_model(model_class), processor
        head = AutoModelForCausalLM.from_pretrained(settings.caption_head, dtype=torch.float32)
        model = self.load_model(model_class, caption_config=head.config)
        model.caption_head.load_state_dict(head.state_dict())
        model.generation_config = head.generation_config
        processor.tokenizer = type(processor.tokenizer).from_pretrained(settings.caption_head)
        return model, processor

    def use_liger_kernels(self) -> None:
        """Trainer itself would look for kernels for a VLV, of which only the caption head has any."""
        try:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance
        except ImportError as error:
            raise ValueError("use_liger_kernel needs the package liger-kernel, which is not installed.") from error
        _apply_liger_kernel_to_instance(model=self.model.caption_head, **(self.args.liger_kernel_config or {}))

    def captioned(self, rows: Dataset, description: str) -> Table | CaptionedImages:
        captions = list(captions_of(rows, self.settings.caption_column))
        text = self.processor(text=captions, return_labels=True, max_length=self.settings.max_length)
        cached = self.cache(rows, latents=False, description=description)
        if isinstance(cached, Images):
            return CaptionedImages(cached, Table(**text))
        return Table(**cached.columns, **text)

    def collate(self, batch) -> dict[str, torch.Tensor]:
        batch = dict(batch) if isinstance(batch, dict) else torch.utils.data.default_collate(batch)
        longest = int(batch["attention_mask"].sum(1).max())  # padding up to the longest of the batch, no further
        return batch | {name: batch[name][:, :longest] for name in ("input_ids", "attention_mask", "labels")}

    def samples(self) -> str:
        rows, _, pixel_values = self.sample_rows()
        truths = [row[self.settings.caption_column] for row in rows]
        truths = [truth if isinstance(truth, str) else truth[0] for truth in truths]
        length = self.processor(text=truths)["input_ids"].shape[1] + 8
        ids = self.model.eval().generate(pixel_values=pixel_values, max_new_tokens=length, do_sample=False)
        return markdown_table(("written", "true"), list(zip(self.processor.batch_decode(ids), truths, strict=True)))

    @torch.no_grad()
    def whole(self) -> VLVModel:
        """
        The trained model with the decoder that it started with, which this stage never loads. With adapters that are
        not merged: the model that they go onto.
        """
        model, _ = self.load(VLVModel)
        if self.settings.lora_rank is not None:
            return merge_adapters(model, self.model) if self.settings.merge_lora else model
        weights = dict(model.named_parameters())
        for name, trained in self.state().items():
            weights[name].copy_(trained)
        return model

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / ADAPTER_CONFIG_NAME).unlink(missing_ok=True)  # an earlier run's adapters are not this model's
        if self.settings.lora_rank is not None and not self.settings.merge_lora:
            self.model.save_pretrained(folder)  # the adapters alone, which loading the folder puts onto the model

    @torch.inference_mode()
    def evaluate(self, num: int = 500) -> dict[str, float]:
        """Share of the evaluation captions that greedy search gives back word for word, and that end by themselves."""
        if not isinstance(self.eval_dataset, Table):
            return {}
        model, columns = self.model.eval(), self.eval_dataset.columns
        right = ended = total = 0
        for start in range(0, min(num, len(self.eval_dataset)), 100):
            rows = slice(start, start + 100)
            cached = {name: columns[name][rows] for name in ("caption_embeds", "image_features") if name in columns}
            if "image_features" in cached:
                cached = {"caption_embeds": model.encode(image_features=cached["image_features"].to(self.args.device))}
            ids = model.generate(**cached, max_new_tokens=columns["input_ids"].shape[1] + 8, do_sample=False).cpu()
            truth = self.processor.batch_decode(columns["input_ids"][rows])
            right += sum(said == true for said, true in zip(self.processor.batch_decode(ids), truth, strict=True))
            ended += (ids == self.processor.tokenizer.eos_token_id).any(1).sum().item()
            total += len(ids)
        return {"exact_captions": right / total, "ended": ended / total}
