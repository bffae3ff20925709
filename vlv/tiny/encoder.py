"""Stage `encoder`: a small Florence-2 learns to say one thing about an image, in a short caption."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoTokenizer,
    BartConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2VisionConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from layers_vlv import check_encoder_size
from vlv.data.rows import captions_of
from vlv.tiny.tokenization import train_tokenizer
from vlv.training.checks import require_at_least_1, require_multiples
from vlv.training.examples import Table, tokenize
from vlv.training.stage import Settings, Stage

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass
class EncoderSettings(Settings):
    encoder: str | None = field(
        default=None, metadata={"help": "Folder of a Florence-2 to start from (default: a new one)."}
    )
    caption_column: str = field(
        default="short",
        metadata={"help": "Column of short captions: one per image, or a list."},
    )
    image_size: int = field(
        default=32, metadata={"help": "Side of the images in pixels, a multiple of the product of all strides."}
    )
    vision_widths: list[int] = field(
        default_factory=lambda: [64, 128], metadata={"help": "Channels of the vision tower's stages, multiples of 32."}
    )
    vision_strides: list[int] = field(
        default_factory=lambda: [4, 2], metadata={"help": "How many times smaller each stage makes the image."}
    )
    width: int = field(default=160, metadata={"help": "Width of the language encoder and decoder, a multiple of 4."})
    max_length: int = field(default=16, metadata={"help": "Caption length in tokens, <s>, </s> and padding included."})
    vocab_size: int = field(default=600, metadata={"help": "Largest size of the vocabulary; 256 entries are bytes."})
    task_prompt: str = field(
        default="Describe with a paragraph what is shown in the image.",
        metadata={"help": "Prompt that the language encoder reads after the image."},
    )

    def __post_init__(self):
        require_at_least_1(self, "max_length", "image_size")
        if self.encoder is not None:  # it has its own sizes
            return
        require_multiples(self, vision_widths=32, vision_strides=1, width=4)
        if len(self.vision_widths) != len(self.vision_strides):
            raise ValueError(
                f"There are {len(self.vision_widths)} vision_widths and {len(self.vision_strides)} vision_strides:"
                " give one of each for every stage of the vision tower."
            )
        require_multiples(self, image_size=math.prod(self.vision_strides))


def tiny_florence2(
    tokenizer: PreTrainedTokenizerBase,
    image_size: int,
    vision_widths: Sequence[int],
    vision_strides: Sequence[int],
    width: int,
) -> Florence2ForConditionalGeneration:
    """A randomly initialised Florence-2: a DaViT with one block in each stage, and a BART."""
    heads = [channels // 32 for channels in vision_widths]
    model = Florence2ForConditionalGeneration(
        Florence2Config(
            vision_config=Florence2VisionConfig(
                depths=(1,) * len(vision_widths),
                patch_size=[2 * stride - 1 for stride in vision_strides],
                patch_stride=list(vision_strides),
                patch_padding=[stride - 1 for stride in vision_strides],
                patch_prenorm=[False] + [True] * (len(vision_widths) - 1),
                embed_dim=tuple(vision_widths),
                num_heads=heads,
                num_groups=heads,
                window_size=4,
                drop_path_rate=0.0,
                projection_dim=width,
                max_position_embeddings=image_size // math.prod(vision_strides),
                max_temporal_embeddings=1,
            ),
            text_config=BartConfig(
                vocab_size=len(tokenizer),
                d_model=width,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=4 * width,
                decoder_ffn_dim=4 * width,
                max_position_embeddings=128,
                dropout=0.0,
                bos_token_id=tokenizer.bos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                decoder_start_token_id=tokenizer.eos_token_id,
                forced_eos_token_id=None,
            ),
            image_token_id=tokenizer.image_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    # With the default of 0.02 the position embeddings are small beside the image features, and learning where things
    # are takes far longer.
    positions = model.model.multi_modal_projector.image_position_embed
    for embedding in (positions.row_embeddings, positions.column_embeddings):
        nn.init.normal_(embedding.weight, std=0.5)
    return model


class ShortCaptioning(nn.Module):
    """The captioning loss of a Florence-2 that reads image tokens and then a task prompt, as VLV's encoder does.

    Each image is encoded once, and all of its short captions are learned together. One random caption would say little
    about the image, and the model could not know which thing it is about.
    """

    def __init__(self, florence: Florence2ForConditionalGeneration, prompt_ids: list[int]):
        super().__init__()
        self.florence = florence
        self.register_buffer("prompt_ids", torch.tensor(prompt_ids))

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> the inputs of the language encoder, (B, image tokens + prompt, D)."""
        image_features = self.florence.get_image_features(pixel_values).pooler_output
        prompt = self.florence.get_input_embeddings()(self.prompt_ids).expand(len(pixel_values), -1, -1)
        return torch.cat([image_features, prompt], dim=1)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """labels: (B, K, L), K captions per image, -100 on padding and for captions that an image does not have."""
        memory = self.florence.model.language_model.encoder(inputs_embeds=self.embed(pixel_values)).last_hidden_state
        # Missing captions and padding that all captions share add nothing to the loss, so they are cut to save time.
        learned = labels != -100
        image, caption = learned.any(-1).nonzero(as_tuple=True)
        labels = labels[image, caption, : learned.any(0).any(0).sum()]
        return {"loss": self.florence(encoder_outputs=BaseModelOutput(memory[image]), labels=labels).loss}


class EncoderStage(Stage):
    Settings = EncoderSettings

    def __init__(self, settings: EncoderSettings, args: TrainingArguments):
        super().__init__(settings, args)
        self.rows = tuple(map(self.captioned, self.load_data()))  # the captions make the vocabulary
        if settings.encoder is not None:
            florence = Florence2ForConditionalGeneration.from_pretrained(settings.encoder, dtype=torch.float32)
            self.tokenizer = AutoTokenizer.from_pretrained(settings.encoder)
        else:
            self.tokenizer = self.train_tokenizer(self.rows[0])
            florence = tiny_florence2(
                self.tokenizer,
                settings.image_size,
                settings.vision_widths,
                settings.vision_strides,
                settings.width,
            )
        check_encoder_size(settings.image_size, florence.config, "image_size")
        prompt = self.tokenizer(settings.task_prompt)["input_ids"]
        tokens = (settings.image_size // math.prod(florence.config.vision_config.patch_stride)) ** 2 + 1 + len(prompt)
        if tokens > florence.config.text_config.max_position_embeddings:
            raise ValueError(
                f"image_size is {settings.image_size}: the image and the task_prompt make {tokens} tokens, but the"
                f" language encoder reads {florence.config.text_config.max_position_embeddings}: make one smaller."
            )
        self.model = ShortCaptioning(florence, prompt)
        self.image_processor = CLIPImageProcessorPil(
            size={"height": settings.image_size, "width": settings.image_size},
            do_center_crop=False,
            image_mean=list(IMAGE_MEAN),
            image_std=list(IMAGE_STD),
            image_seq_length=(settings.image_size // math.prod(settings.vision_strides)) ** 2 + 1,
        )

    def prepare(self) -> None:
        (train, images), (self.eval_rows, eval_images) = (
            self.read_images(rows, self.settings.image_size) for rows in self.rows
        )
        self.train_dataset, self.eval_dataset = self.table(train, images), self.table(self.eval_rows, eval_images)

    def train_tokenizer(self, rows: Dataset) -> PreTrainedTokenizerBase:
        captions = [caption for alternatives in self.captions(rows) for caption in alternatives]
        # The prompt is repeated as often as there are captions, so that each of its words becomes one token too.
        return train_tokenizer(
            [*captions, *[self.settings.task_prompt] * len(captions)],
            self.settings.vocab_size,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            extra_special_tokens={"image_token": "<image>"},
        )

    def captions(self, rows: Dataset) -> list[list[str]]:
        return [captions_of(value) for value in rows[self.settings.caption_column][:]]

    def table(self, rows: Dataset, images: torch.Tensor) -> Table:
        captions = self.captions(rows)
        ids = tokenize(self.tokenizer, [c for texts in captions for c in texts], self.settings.max_length)
        labels = ids.masked_fill(ids == self.tokenizer.pad_token_id, -100).split([len(c) for c in captions])
        return Table(images=images, labels=pad_sequence(labels, batch_first=True, padding_value=-100))  # (N, K, L)

    def collate(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"pixel_values": normalise(batch["images"]), "labels": batch["labels"]}

    def save(self, folder: Path) -> None:
        self.model.florence.generation_config.max_new_tokens = self.settings.max_length
        self.model.florence.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """The share of generated captions that are true for their picture, and the number of different captions."""
        florence, images = self.model.florence, self.eval_dataset.columns["images"]
        said: list[str] = []
        for batch in images.split(250):
            embeds = self.model.embed(normalise(batch).to(self.args.device))
            memory = florence.model.language_model.encoder(inputs_embeds=embeds)
            ids = florence.generate(
                encoder_outputs=memory, max_new_tokens=self.settings.max_length, num_beams=1, do_sample=False
            )
            said += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        true = sum(text in truths for text, truths in zip(said, self.captions(self.eval_rows), strict=True))
        return {"true_captions": true / len(said), "different_captions": len(set(said))}


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> images normalised for Florence-2, with ImageNet's mean and standard deviation."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return (images.float() / 255 - mean) / std
