"""What the two stages that train a VLV share: its settings, its cached inputs, and how it is saved whole."""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from PIL.Image import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainingArguments

from modeling_vlv import STAGES, VLVModel
from processing_vlv import VLVProcessor
from vlv import tiny_checkpoint
from vlv.data import Table
from vlv.loading import read_config
from vlv.stages.base import Settings, Stage

ENCODER_PARTS = {"language_model", "word_embeddings", "queries", "projection"}
VISION_PARTS = {"vision_tower", "image_projection"}


@dataclass
class VLVSettings(Settings):
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the VLV to go on from; vlv-tiny is the bundled one."}
    )
    train_parts: list[str] | None = field(
        default=None, metadata={"help": "Parts to train in place of the stage's own (see VLVModel.set_stage)."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, ... (default: the best that is installed)."}
    )
    gradient_checkpointing_parts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts that save memory by a second forward pass: encoder, unet, caption_head"
            " (--gradient_checkpointing: all of them)."
        },
    )
    save_dtype: str | None = field(
        default=None, metadata={"help": "Precision of the final weights, e.g. float16 (default: as trained)."}
    )


class Images(torch.utils.data.Dataset):
    """The images of a data set as the processor makes them, one by one."""

    def __init__(self, rows: Dataset, column: str, processor: VLVProcessor, decoder: bool):
        self.rows, self.column, self.processor, self.decoder = rows, column, processor, decoder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        inputs = self.processor(images=self.rows[index][self.column], return_decoder_pixel_values=self.decoder)
        return {name: tensor[0] for name, tensor in inputs.items()}


class VLVStage(Stage):
    """A stage of a VLV. What is frozen is computed once per image and kept in memory.

    A subclass loads `model` and `processor`, then calls `choose_parts`, then loads its data.
    """

    stage: str
    eval_rows: Dataset
    model: VLVModel
    processor: VLVProcessor

    def __init__(self, settings: VLVSettings, args: TrainingArguments):
        super().__init__(settings, args)
        if settings.save_dtype is not None and not isinstance(getattr(torch, settings.save_dtype, None), torch.dtype):
            raise ValueError(f"save_dtype is {settings.save_dtype!r}: name a torch dtype, e.g. float16.")
        bundled = settings.model == "vlv-tiny" and not Path(settings.model).is_dir()
        self.source = tiny_checkpoint() if bundled else settings.model

    def load_model(self, model_class: type[VLVModel], **kwargs) -> VLVModel:
        """The model to go on from, in fp32: what trains must not be held in less."""
        read_config(self.source)  # says in one sentence why it is no VLV
        return model_class.from_pretrained(
            self.source, dtype=torch.float32, attn_implementation=self.settings.attn_implementation, **kwargs
        )

    def choose_parts(self) -> None:
        """Freezes and thaws, in the one place that does."""
        settings = self.settings
        self.train_parts = set(settings.train_parts or STAGES[self.stage])
        try:
            self.model.set_stage(self.stage, train=tuple(self.train_parts))
        except ValueError as error:
            raise ValueError(f"{self.source or 'The model'}: {error}") from error
        if settings.gradient_checkpointing_parts is not None:
            known = [name for name in ("encoder", "unet", "caption_head") if getattr(self.model, name) is not None]
            if unknown := set(settings.gradient_checkpointing_parts) - set(known):
                raise ValueError(
                    f"gradient_checkpointing_parts can be {', '.join(known)} in this stage, not {', '.join(unknown)}."
                )
            self.model.gradient_checkpointing_enable(parts=settings.gradient_checkpointing_parts)

    @torch.inference_mode()
    def cache(self, rows: Dataset, latents: bool, description: str) -> Table | Images:
        """
        The images of `rows` as far as frozen parts can take them: `caption_embeds`, or `image_features` where the
        encoder trains behind its vision tower; with `latents`, also the distributions of the VAE's latents. Where
        the vision tower itself trains, the images themselves.
        """
        images = Images(rows, self.settings.image_column, self.processor, decoder=latents)
        if self.train_parts & VISION_PARTS:
            return images
        model = self.model.to(self.args.device).eval()
        loader = DataLoader(images, batch_size=200, num_workers=self.args.dataloader_num_workers)
        found: dict[str, list[torch.Tensor]] = {}
        for batch in tqdm(loader, desc=description, unit="batch", disable=None):
            outputs = {"image_features": model.get_image_features(batch["pixel_values"])}
            if not self.train_parts & ENCODER_PARTS:
                outputs = {"caption_embeds": model.encode(image_features=outputs["image_features"])}
            if latents:
                outputs |= dict(zip(("latent_mean", "latent_std"), self.latents(batch), strict=True))
            for name, output in outputs.items():
                found.setdefault(name, []).append(output.float().cpu())
        return Table(**{name: torch.cat(parts) for name, parts in found.items()})

    def latents(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the images' latents, (B, C, h/f, w/f) each, in the UNet's scale."""
        vae = self.model.vae
        posterior = vae.encode(batch["decoder_pixel_values"].to(vae.device, vae.dtype)).latent_dist
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        return (posterior.mean - shift) * scale, posterior.std * scale

    def parts(self) -> dict[str, nn.Module]:
        parts = {name: part for name, part in self.model.named_parts() if part is not None}
        return {
            name: nn.ParameterList([part]) if isinstance(part, nn.Parameter) else part for name, part in parts.items()
        }

    def sample_rows(self, count: int = 12) -> tuple[list[dict], list[Image], torch.Tensor]:
        """A few evaluation rows, what the model sees of their images, and that as its `pixel_values`."""
        rows = list(islice(self.eval_rows, count))
        images = [self.processor.preprocess_image(row[self.settings.image_column]) for row in rows]
        return rows, images, self.processor(images=images)["pixel_values"]

    def whole(self) -> VLVModel:
        """The model with the parts that this stage did not load."""
        return self.model

    def save(self, folder: Path) -> None:
        model = self.whole()
        if self.settings.save_dtype is not None:
            model = model.to(getattr(torch, self.settings.save_dtype))
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
