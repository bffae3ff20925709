"""Stage `autoencode` (stage 1): the encoder learns embeddings from which the frozen teacher redraws the image."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from configuration_vlv import VLVConfig
from layers_vlv import check_encoder_size
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.sheets import Pair, contact_sheet
from vlv.training.caching import AUTO, parse_switch
from vlv.training.examples import Table, fixed_noise
from vlv.training.vlv_settings import VLVSettings
from vlv.training.vlv_stage import VLVStage

# Settings that the model's config holds for its loss.
LOSS_SETTINGS = (
    "sample_latents",
    "denoising_loss",
    "min_snr_gamma",
    "timestep_density",
    "timestep_shift",
    "noise_draws",
    "context_dropout",
)


@dataclass
class AutoencodeSettings(VLVSettings):
    encoder: str | None = field(default=None, metadata={"help": "Without --model: folder or id of a Florence-2."})
    decoder: str | None = field(
        default=None, metadata={"help": "Without --model: folder or id of a text-to-image model of diffusers."}
    )
    caption_head: str | None = field(
        default=None, metadata={"help": "Without --model: folder or id of the language model that stage 2 will train."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the rebuilt images (default: the teacher's, or that of --model)."}
    )
    encoder_image_size: int | None = field(
        default=None,
        metadata={"help": "Side of the images that the encoder reads (default: the encoder's, or that of --model)."},
    )
    projection_start: str = field(
        default="zero",
        metadata={
            "help": "Without --model: around what new caption embeddings start, zero or the mean of the teacher's word"
            " embeddings: zero or mean."
        },
    )
    crop: str | None = field(
        default=None,
        metadata={
            "help": "center: train on the centre of each image, as the paper does (default: the whole image, or as"
            " --model does)."
        },
    )
    sample_latents: bool = field(
        default=True, metadata={"help": "Sample the VAE's latents instead of taking their mean."}
    )
    cache_latents: str = field(
        default=AUTO,
        metadata={
            "help": "Run the frozen VAE once on each image, before training, and keep its latents on disk (their"
            " distributions if they are sampled): true, false, or auto, which decides as for cache_features. At the"
            " published size they take 37 KB per image in bf16 training.",
            "nargs": "?",
            "const": True,
        },
    )
    denoising_loss: str = field(default="mse", metadata={"help": "mse or l1."})
    min_snr_gamma: float | None = field(default=None, metadata={"help": "Weight the loss by min(SNR, gamma)."})
    timestep_density: str = field(
        default="uniform", metadata={"help": "How timesteps are drawn: uniform, logit_normal or mode."}
    )
    timestep_shift: float = field(
        default=1.0, metadata={"help": "Moves the drawn timesteps towards noise (above 1) or the image (below 1)."}
    )
    timestep_shift_steps: int | None = field(
        default=None, metadata={"help": "Shift the timesteps of so many first steps only (default: of all steps)."}
    )
    noise_draws: int = field(
        default=1, metadata={"help": "Noise levels that a step draws for each image, which is encoded once."}
    )
    context_dropout: float = field(default=0.0, metadata={"help": "Share of contexts replaced by the empty prompt."})

    def __post_init__(self):
        super().__post_init__()
        self.cache_latents = parse_switch("cache_latents", self.cache_latents)
        if self.crop not in (None, "center"):
            raise ValueError(f"crop is {self.crop!r}: give center, or leave it out.")
        if self.projection_start not in ("zero", "mean"):
            raise ValueError(f"projection_start is {self.projection_start!r}: give zero or mean.")
        steps = self.timestep_shift_steps
        if steps is not None and steps < 1:
            raise ValueError(
                f"timestep_shift_steps is {steps}: give at least 1, or leave it out to shift in all steps."
            )
        if steps is not None and self.timestep_shift == 1:
            raise ValueError(f"timestep_shift_steps is {steps}, but timestep_shift is 1, which moves no timestep.")


class EndOfShift(TrainerCallback):
    """
    Draws timesteps without a shift after the first `steps` steps. Noisy timesteps teach what is where; others teach
    details.
    """

    def __init__(self, config: VLVConfig, steps: int):
        self.config, self.steps = config, steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.steps:
            self.config.timestep_shift = 1.0


class AutoencodeStage(VLVStage):
    Settings = AutoencodeSettings
    stage = "autoencode"
    image_inputs = ("pixel_values", "decoder_pixel_values")
    unreached = ("vae", "prefix_projection", "caption_head")  # the VAE only makes the latents, without gradients

    def __init__(self, settings: AutoencodeSettings, args: TrainingArguments):
        super().__init__(settings, args)
        if settings.model is not None:
            self.model = self.load_model(VLVModel)
            self.processor = VLVProcessor.from_pretrained(self.source)
            if settings.encoder_image_size is not None:
                check_encoder_size(settings.encoder_image_size, self.model.config.encoder_config)
                self.processor.image_height = self.processor.image_width = settings.encoder_image_size
            if settings.image_size is not None:
                self.model.config.image_size = self.processor.decoder_image_size = settings.image_size
            if settings.crop is not None:
                self.processor.crop = settings.crop
            self.tell_unused()
        elif settings.encoder and settings.decoder:
            parts = {name: getattr(settings, name) for name in ("encoder", "decoder", "caption_head", "image_size")}
            self.processor = VLVProcessor.from_components(
                **parts, encoder_image_size=settings.encoder_image_size, crop=settings.crop
            )
            self.model = VLVModel.from_components(
                **parts,
                dtype=torch.float32,
                projection_start=settings.projection_start,
                attn_implementation=settings.attn_implementation,
            )
        else:
            raise ValueError("There is no model to start from: give --model, or --encoder and --decoder.")
        for name in LOSS_SETTINGS:
            setattr(self.model.config, name, getattr(settings, name))
        self.model.config.check()
        self.choose_parts()
        if settings.image_size is not None:
            self.model.teacher.check_size(settings.image_size, settings.image_size)

    def tell_unused(self) -> None:
        """Says which settings the model makes needless. A recipe may name parts, which --model then replaces."""
        named = ("encoder", "decoder", "caption_head", "projection_start")
        unused = [name for name in named if getattr(self.settings, name) != getattr(AutoencodeSettings, name)]
        if unused:
            self.tell(f"{', '.join(unused)}: not used, because the training starts from {self.settings.model}.")

    def prepare(self) -> None:
        latents = ("latent_mean", "latent_std") if self.settings.sample_latents else ("latents",)
        # Evaluation uses the mean and fixed noise, so that its losses can be compared.
        features = {"cache_features": self.features()}
        self.prepare_data({"cache_latents": latents, **features}, features, besides=("latents",))
        shape = self.eval_dataset[0]["latents"].shape
        timesteps = self.model.teacher.num_timesteps
        self.eval_dataset.cached.append(Table(**fixed_noise(len(self.eval_rows), shape, timesteps)))

    def callbacks(self) -> list[TrainerCallback]:
        steps = self.settings.timestep_shift_steps
        return [*super().callbacks(), *([] if steps is None else [EndOfShift(self.model.config, steps)])]

    def collate(self, batch: dict[str, Any] | list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = super().collate(batch)
        if "latent_mean" in inputs:  # sampled again in every epoch
            mean, std = inputs.pop("latent_mean"), inputs.pop("latent_std")
            noise = np.stack([random.standard_normal(mean.shape[1:], dtype=np.float32) for random in batch["random"]])
            inputs["latents"] = mean + std * torch.from_numpy(noise)
        return inputs

    def samples(self) -> Image:
        _, images, pixel_values = self.sample_rows()
        generators = [torch.Generator().manual_seed(number) for number in range(len(images))]
        rebuilt = self.model.eval().reconstruct(pixel_values=pixel_values, generator=generators)
        pairs = [Pair(image, reconstruction, "") for image, reconstruction in zip(images, rebuilt, strict=True)]
        return contact_sheet(pairs, "Reconstructions", "Left: the original. Right: rebuilt from caption embeddings.")

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """Denoising losses on the evaluation images: with their own context, and with the empty context, the floor."""
        model, total = self.model.eval(), {"denoising_loss": 0.0, "denoising_loss_with_empty_context": 0.0}
        for batch in DataLoader(self.eval_dataset, batch_size=200, collate_fn=self.collate):
            batch = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
            count = len(batch["latents"])
            own = model(**batch).denoising_loss
            empty = model.empty_prompt(batch_size=count)
            noise = {name: batch[name] for name in ("noise", "timesteps")}
            floor = model.compute_denoising_loss(batch["latents"], empty, **noise)
            for name, loss in zip(total, (own, floor), strict=True):
                total[name] += loss.item() * count / len(self.eval_dataset)
        return total
