"""A peer of VLV: a LLaVA captioner, built from transformers' own class and from the pretrained parts of VLV.

The image tokens of Florence-2's frozen vision tower pass through LLaVA's projector. The language model reads them
before the caption. `experiments/recipes/llava.yaml` trains it.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Florence2Config,
    Florence2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    TrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.florence2.modeling_florence2 import (
    Florence2MultiModalProjector,
    Florence2PreTrainedModel,
    Florence2VisionBackbone,
)

from vlv.data.rows import captions_of
from vlv.tiny.encoder import normalise
from vlv.training.examples import Table
from vlv.training.stage import Settings, Stage

IMAGE_TOKEN = "<image>"


class ImageTokensConfig(Florence2Config):
    model_type = "florence2_image_tokens"

    @property
    def hidden_size(self) -> int:
        return self.vision_config.projection_dim


class ImageTokens(Florence2PreTrainedModel):
    """The vision tower of a Florence-2, with the interface that LLaVA needs: (B, 3, H, W) -> image tokens."""

    config_class = ImageTokensConfig

    def __init__(self, config: ImageTokensConfig):
        super().__init__(config)
        self.vision_tower = Florence2VisionBackbone(config.vision_config)
        self.multi_modal_projector = Florence2MultiModalProjector(config)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        tokens = self.multi_modal_projector(self.vision_tower(pixel_values).last_hidden_state)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register(ImageTokensConfig.model_type, ImageTokensConfig)
AutoModel.register(ImageTokensConfig, ImageTokens)


@dataclass
class LlavaSettings(Settings):
    encoder: str | None = field(default=None, metadata={"help": "Folder of the Florence-2 with the vision tower."})
    language: str | None = field(default=None, metadata={"help": "Folder of the language model."})


def assemble(encoder: str, language: str) -> LlavaForConditionalGeneration:
    """A LLaVA with a new projector. All of it trains, except the vision tower."""
    florence = Florence2Model.from_pretrained(encoder, dtype=torch.float32)
    llm = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    image_token_id = llm.config.vocab_size
    llm.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
    vision = {name: value for name, value in florence.config.to_dict().items() if name != "model_type"}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=ImageTokensConfig(**vision),
            text_config=llm.config,
            image_token_index=image_token_id,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=True,
        )
    )
    seeing = {name: value for name, value in florence.state_dict().items() if not name.startswith("language_model.")}
    model.model.vision_tower.load_state_dict(seeing)
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.generation_config = llm.generation_config
    model.model.vision_tower.requires_grad_(False)
    return model


class LlavaStage(Stage):
    Settings = LlavaSettings

    def __init__(self, settings: LlavaSettings, args: TrainingArguments):
        super().__init__(settings, args)
        self.model = assemble(settings.encoder, settings.language)
        self.tokenizer = AutoTokenizer.from_pretrained(settings.language)
        self.tokenizer.add_tokens(IMAGE_TOKEN, special_tokens=True)
        self.image_tokens = image_tokens(self.model)

    def prepare(self) -> None:
        self.train_dataset, self.eval_dataset = (
            self.table(*self.read_images(self.captioned(rows), image_size(self.model))) for rows in self.load_data()
        )

    def table(self, rows, images: torch.Tensor) -> Table:
        captions = [captions_of(value)[0] + self.tokenizer.eos_token for value in rows[self.settings.caption_column]]
        ids = [torch.tensor(caption) for caption in self.tokenizer(captions)["input_ids"]]
        return Table(images=images, labels=pad_sequence(ids, batch_first=True, padding_value=-100))

    def collate(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        labels = batch["labels"]
        images = self.image_tokens.expand(len(labels), -1)
        captions = labels.masked_fill(labels == -100, self.tokenizer.pad_token_id)
        return {
            "pixel_values": normalise(batch["images"]),
            "input_ids": torch.cat([images, captions], dim=1),
            "attention_mask": torch.cat([torch.ones_like(images), (labels != -100).long()], dim=1),
            "labels": torch.cat([torch.full_like(images, -100), labels], dim=1),
        }

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def image_tokens(model: LlavaForConditionalGeneration) -> torch.Tensor:
    """The token ids (T,) of an image's placeholder in the text."""
    with torch.inference_mode():
        tower = model.model.vision_tower.eval()
        count = tower(torch.zeros(1, 3, image_size(model), image_size(model))).last_hidden_state.shape[1]
    return torch.full((count,), model.config.image_token_id)


def image_size(model: LlavaForConditionalGeneration) -> int:
    """The side, in pixels, of the images that its vision tower has positions for."""
    vision = model.config.vision_config.vision_config
    return vision.max_position_embeddings * math.prod(vision.patch_stride)
