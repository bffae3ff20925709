"""Stage `caption` (stage 2): the language model learns to write captions from caption embeddings."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, IterableDataset
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForCausalLM, TrainingArguments

from modeling_vlv import VLVForConditionalGeneration, VLVModel, VLVOutput
from processing_vlv import VLVProcessor
from prompts_vlv import check_styles, prompt_ids
from stopping_vlv import stop_at_repetition
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.data.rows import pairs_of, require_column, require_text
from vlv.models.loading import load_weights, read_config
from vlv.training.checks import require_at_least_1
from vlv.training.examples import draw_pairs, merge
from vlv.training.lora import LoraSettings, add_adapters, merge_adapters, require_rank
from vlv.training.samples import markdown_table
from vlv.training.vlv_settings import VLVSettings
from vlv.training.vlv_stage import VLVStage

SHORT_PROMPT = 64  # bytes


@dataclass
class CaptionSettings(LoraSettings, VLVSettings):
    caption_head: str | None = field(
        default=None, metadata={"help": "Folder or id of a language model, if --model has no caption head yet."}
    )
    max_length: int = field(default=300, metadata={"help": "Longest caption in tokens; longer ones are cut."})
    prompt_column: str = field(
        default="prompt",
        metadata={
            "help": "Column with the prompt of each caption: one, a list as long as that of the captions, or none. A"
            " dataset without it trains captions alone."
        },
    )
    styles: str | None = field(
        default=None,
        metadata={
            "help": "JSON or YAML file that maps the names of styles to their prompts, which the model keeps for its"
            " users (vlv caption --style NAME)."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        require_rank(self)
        require_at_least_1(self, "max_length")


class CaptionStage(VLVStage):
    Settings = CaptionSettings
    stage = "caption"
    image_inputs = ("pixel_values",)
    unreached = ("unet", "transformer", "vae")
    reads_captions = True
    smooths_labels = True

    def __init__(self, settings: CaptionSettings, args: TrainingArguments):
        super().__init__(settings, args)
        if settings.model is None:
            raise ValueError("Stage 2 starts from a stage-1 model: give its folder with --model.")
        if settings.caption_head is None and read_config(self.source).caption_config is None:
            raise ValueError(f"{self.source} has no caption head yet: name a language model with --caption_head.")
        self.model, self.processor = self.load(VLVForConditionalGeneration)
        self.styles = {} if settings.styles is None else read_styles(settings.styles)
        self.choose_parts()
        if settings.lora_rank is not None:
            add_adapters(self.model, self.train_parts, settings)
        if args.use_liger_kernel:
            self.use_liger_kernels()

    def prepare(self) -> None:
        features = {"cache_features": self.features()}
        self.prepare_data(train=features, evaluation=features)

    def find_prompts(self, *datasets: Dataset | IterableDataset) -> None:
        """
        The dataset has prompts if the column is there. The checkpoint then records that it takes them, and its styles.

        Raises:
            ValueError: the column is not text; or it is missing, but was named or is needed for styles.
        """
        column = self.settings.prompt_column
        found = [
            rows for rows in datasets if column in (rows.column_names or ()) and column != self.settings.caption_column
        ]
        if not found:
            if not self.styles and column == CaptionSettings.prompt_column:
                return
            require_column(datasets[0], column, "prompt_column")  # a stream may not know its columns
        for rows in found:
            require_text(rows, column, "prompt_column")
        self.prompt_column = column
        self.processor.learn_prompts(self.styles)
        self.tell(f"prompts: from the column '{column}'.")

    def check_prompts(self, prompts: list[str]) -> None:
        for prompt in prompts:
            # A token is at least a byte, so that a short prompt need not be counted.
            if prompt and len(prompt.encode()) > SHORT_PROMPT:
                self.model.check_text_length(len(prompt_ids(self.processor.tokenizer, prompt)))

    def load(self, model_class: type[VLVModel]) -> tuple[VLVModel, VLVProcessor]:
        """The model to start from. It gets a new caption head if it has none, and here learns to end its captions."""
        settings = self.settings
        processor = VLVProcessor.from_pretrained(self.source)
        if settings.caption_head is None:
            model = self.load_model(model_class)
        else:
            head = load_weights(AutoModelForCausalLM, settings.caption_head, dtype=torch.float32)
            model = self.load_model(model_class, ("prefix_projection.", "caption_head."), caption_config=head.config)
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
        captions, prompts = draw_pairs(batch)
        text = self.processor(text=captions, prompt=prompts, return_labels=True, max_length=self.settings.max_length)
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
        rows = self.train_dataset.rows
        captions = rows[self.settings.caption_column][:]
        prompts = rows[self.prompt_column][:] if self.prompt_column in rows.column_names else [None] * len(captions)
        return [longest_pair(*row) for row in zip(captions, prompts, strict=True)]

    def samples(self) -> str:
        rows, _, pixel_values = self.sample_rows()
        column = self.prompt_column
        pairs = [self.usable_pairs(row) for row in rows]
        kept = [number for number, found in enumerate(pairs) if found]
        if not kept:
            return "None of these rows can be used: failures.jsonl says why.\n"
        # A different one of each row's captions, so that the prompts are not all alike.
        truths, prompts = zip(*(pairs[number][number % len(pairs[number])] for number in kept), strict=True)
        rows, pixel_values = [rows[number] for number in kept], pixel_values[kept]
        length = self.processor(text=truths)["input_ids"].shape[1] + 8
        captioner = Captioner(self.model.eval(), self.processor, Decoding(max_new_tokens=length), len(rows))
        written = [best.text for best, *_ in captioner(range(len(rows)), pixel_values, prompts)]
        if column is None:
            return markdown_table(("written", "true"), list(zip(written, truths, strict=True)))
        return markdown_table(("prompt", "written", "true"), list(zip(prompts, written, truths, strict=True)))

    def usable_pairs(self, row: dict[str, Any]) -> list[tuple[str, str]]:
        """The captions of a row with their prompts; none of a row that the training leaves out."""
        try:
            pairs = pairs_of(row[self.settings.caption_column], row.get(self.prompt_column))
            self.check_prompts([prompt for _, prompt in pairs])
        except ValueError:
            return []
        return pairs

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
        for samples in DataLoader(rows, batch_size=100, collate_fn=dict):
            captions, prompts = draw_pairs(samples)
            whole = self.processor(text=captions, return_labels=True, max_length=self.settings.max_length)["input_ids"]
            truth, length = self.processor.batch_decode(whole), whole.shape[1] + 8
            batch = super().collate(samples)
            if "caption_embeds" not in batch:
                image = {name: batch[name] for name in ("pixel_values", "image_features") if name in batch}
                batch["caption_embeds"] = model.encode(**image)
            captioner = Captioner(model, self.processor, Decoding(max_new_tokens=length), len(truth))
            written = [best for best, *_ in captioner.write(truth, batch["caption_embeds"], prompts)]
            right += sum(said.text == true for said, true in zip(written, truth, strict=True))
            ended += sum(said.ended for said in written)
            total += len(written)
        return {"exact_captions": right / total, "ended": ended / total}


def read_styles(file: str) -> dict[str, str]:
    """
    The styles of a JSON or YAML file.

    Raises:
        OSError: there is no such file.
        ValueError: it is not a mapping of names to prompts.
    """
    try:
        styles = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))  # JSON is YAML, too
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is neither JSON nor YAML: {' '.join(str(error).split())}") from error
    return check_styles({} if styles is None else styles, file)


def longest_pair(captions: Any, prompts: Any) -> int:
    """The length in bytes of the longest caption of a row, with its prompt."""
    try:
        return max(len(f"{prompt}{caption}".encode()) for caption, prompt in pairs_of(captions, prompts))
    except ValueError:  # the row is left out when it is read
        return 0
