"""Stage `teacher`: a small text-to-image diffusion model, UNet and text encoder, learns to draw from captions."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import make_image_grid
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase, TrainingArguments

from vlv.data.rows import captions_of, open_image, read_captions
from vlv.tiny.tokenization import train_tokenizer
from vlv.training.average import MovingAverage
from vlv.training.cache import as_tensors
from vlv.training.checks import require_at_least_1, require_multiples
from vlv.training.examples import Examples, Table, draw_captions, fixed_noise, squeeze, to_unit_range, tokenize
from vlv.training.stage import Settings, Stage


@dataclass
class TeacherSettings(Settings):
    vae: str | None = field(default=None, metadata={"help": "Folder of the AutoencoderKL, which stays frozen."})
    max_length: int = field(default=24, metadata={"help": "Caption length in tokens, padding included."})
    vocab_size: int = field(default=600, metadata={"help": "Largest size of the vocabulary; 256 entries are bytes."})
    unet_widths: list[int] = field(
        default_factory=lambda: [64, 96, 96], metadata={"help": "Channels of the UNet's levels, multiples of 16."}
    )
    text_width: int = field(default=128, metadata={"help": "Width of the text encoder, a multiple of 4."})
    text_layers: int = field(default=3, metadata={"help": "Layers of the text encoder."})
    caption_dropout: float = field(
        default=0.1, metadata={"help": "Share of captions replaced by the empty one, for classifier-free guidance."}
    )
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of the moving average of the weights."})
    sample_guidance_scale: float = field(default=2.5, metadata={"help": "Guidance of the sample grid."})

    def __post_init__(self):
        require_at_least_1(self, "max_length", "text_layers")
        require_multiples(self, unet_widths=16, text_width=4)


def tiny_unet(vae: AutoencoderKL, widths: Sequence[int], text_width: int) -> UNet2DConditionModel:
    """A randomly initialised UNet. All its levels but the first read the caption."""
    lower = len(widths) - 1
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return UNet2DConditionModel(
        sample_size=vae.config.sample_size // factor,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=tuple(widths),
        layers_per_block=1,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * lower),
        up_block_types=(*("CrossAttnUpBlock2D",) * lower, "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,  # in this class: the number of heads
        norm_num_groups=16,
    )


def tiny_text_encoder(tokenizer: PreTrainedTokenizerBase, max_length: int, width: int, layers: int) -> CLIPTextModel:
    """A randomly initialised CLIP text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=max_length,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def v_prediction_scheduler() -> DDIMScheduler:
    """The noise schedule: v-prediction with zero terminal SNR, so that sampling can start from pure noise."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # has no effect with trailing spacing, but Stable Diffusion's pipeline requires it
    )


class TeacherTraining(nn.Module):
    """The denoising loss on latents, given captions."""

    def __init__(
        self,
        denoiser: dict[str, nn.Module],
        scheduler: SchedulerMixin,
        empty_ids: torch.Tensor,
        caption_dropout: float,
    ):
        super().__init__()
        self.denoiser = nn.ModuleDict(denoiser)  # under the names of diffusers' pipeline
        self.average = deepcopy(self.denoiser).requires_grad_(False)
        self.scheduler = scheduler
        self.caption_dropout = caption_dropout
        self.register_buffer("empty_ids", empty_ids)

    def forward(
        self,
        latent_mean: torch.Tensor,
        latent_std: torch.Tensor,
        input_ids: torch.Tensor,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """latent_mean, latent_std, noise: (B, 4, h, w); input_ids: (B, L); timesteps: (B,).

        Evaluation, which gives noise and timesteps, uses the average weights and drops no caption.
        """
        denoiser, latents = self.average, latent_mean
        if self.training:
            denoiser, latents = self.denoiser, latent_mean + latent_std * torch.randn_like(latent_mean)
            dropped = torch.rand(len(input_ids), 1, device=input_ids.device) < self.caption_dropout
            input_ids = torch.where(dropped, self.empty_ids, input_ids)
        if noise is None:
            noise = torch.randn_like(latents)
        if timesteps is None:
            timesteps = self.draw_timesteps(len(latents)).to(latents.device)
        prediction, target = self.predict(denoiser, latents, noise, timesteps, input_ids)
        return {"loss": nn.functional.mse_loss(prediction.float(), target)}

    def draw_timesteps(self, count: int) -> torch.Tensor:
        """Timesteps (count,) to train on, int64."""
        return torch.randint(self.scheduler.config.num_train_timesteps, (count,))

    def predict(
        self,
        denoiser: nn.ModuleDict,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        input_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction of `denoiser` for the noisy latents, and its target: (B, C, h, w) each."""
        context = denoiser["text_encoder"](input_ids).last_hidden_state  # (B, L, E)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        return denoiser["unet"](noisy, timesteps, context).sample, target


class TeacherStage(Stage):
    Settings = TeacherSettings
    drawing: dict[str, Any] = {}  # what the pipeline's call needs besides

    def __init__(self, settings: TeacherSettings, args: TrainingArguments):
        super().__init__(settings, args)
        if settings.vae is None:
            raise ValueError("The teacher needs a VAE: give its folder with --vae.")
        self.rows = tuple(map(self.captioned, self.load_data()))  # the captions make the vocabulary
        self.vae = AutoencoderKL.from_pretrained(settings.vae).eval().requires_grad_(False)
        captions = [caption for value in self.rows[0][settings.caption_column][:] for caption in captions_of(value)]
        self.tokenizer = train_tokenizer(
            captions,
            settings.vocab_size,
            bos_token="<|startoftext|>",
            eos_token="<|endoftext|>",
            model_max_length=settings.max_length,
        )
        tokenize(self.tokenizer, captions, settings.max_length)  # raises now if a caption is too long
        self.model = self.build(tokenize(self.tokenizer, [""], settings.max_length))

    def build(self, empty_ids: torch.Tensor) -> TeacherTraining:
        """The model to train, randomly initialised."""
        settings = self.settings
        denoiser = {
            "unet": tiny_unet(self.vae, settings.unet_widths, settings.text_width),
            "text_encoder": tiny_text_encoder(
                self.tokenizer, settings.max_length, settings.text_width, settings.text_layers
            ),
        }
        return TeacherTraining(denoiser, v_prediction_scheduler(), empty_ids, settings.caption_dropout)

    def prepare(self) -> None:
        train, evaluation = self.rows
        _, self.train_dataset = self.examples(train)
        self.eval_rows, self.eval_dataset = self.examples(evaluation)
        shape = self.eval_dataset[0]["latent_mean"].shape
        timesteps = self.model.scheduler.config.num_train_timesteps
        self.eval_dataset.cached.append(Table(**fixed_noise(len(self.eval_rows), shape, timesteps)))

    def examples(self, rows: Dataset) -> tuple[Dataset, Examples]:
        """Rows with their latent distributions. Each image is encoded once, because the VAE is frozen."""
        read, column = partial(squeeze, size=self.vae.config.sample_size), self.settings.caption_column
        rows, latents = self.read_once(rows, read, self.encode, [self.vae.config, self.vae], "Encoding images")
        self.vae.cpu()
        captions, read = rows.select_columns([column]), partial(read_captions, column=column)
        return rows, Examples(captions, read, [as_tensors(latents)], self.args.seed, self.left_out.add)

    @torch.no_grad()  # weights that are moved in inference mode could not be trained or saved as usual
    def encode(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        vae = self.vae.to(self.args.device)
        posterior = vae.encode(to_unit_range(batch["images"].to(vae.device))).latent_dist
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        return {"latent_mean": (posterior.mean - shift) * scale, "latent_std": posterior.std * scale}

    def collate(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        inputs = {name: values for name, values in batch.items() if isinstance(values, torch.Tensor)}
        return inputs | {"input_ids": tokenize(self.tokenizer, draw_captions(batch), self.settings.max_length)}

    def parts(self) -> dict[str, nn.Module]:
        return {**self.model.denoiser, "average": self.model.average, "vae": self.vae}

    def state(self) -> dict[str, torch.Tensor]:
        average = self.model.average.named_parameters(prefix="average")
        return super().state() | dict(average)

    def callbacks(self) -> list:
        trained, average = self.model.denoiser.parameters(), self.model.average.parameters()
        return [MovingAverage(trained, average, self.settings.ema_decay)]

    def pipeline(self) -> DiffusionPipeline:
        return StableDiffusionPipeline(
            **self.model.average.eval(),
            vae=self.vae.to(self.args.device),
            tokenizer=self.tokenizer,
            scheduler=self.model.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def save(self, folder: Path) -> None:
        pipeline = self.pipeline()
        pipeline.save_pretrained(folder)

        # Originals above, drawings from their captions below: pictures show more than the loss.
        shown = self.eval_rows[:8]
        pipeline.set_progress_bar_config(disable=True)
        size = self.vae.config.sample_size
        drawn = pipeline(
            [captions_of(value)[0] for value in shown[self.settings.caption_column]],
            height=size,
            width=size,
            num_inference_steps=20,
            guidance_scale=self.settings.sample_guidance_scale,
            generator=torch.Generator().manual_seed(self.args.seed),
            **self.drawing,
        ).images
        originals = [open_image(source).resize((size, size)) for source in shown[self.settings.image_column]]
        make_image_grid(originals + drawn, rows=2, cols=len(drawn)).save(folder / "samples.png")

    def evaluate(self) -> dict[str, float]:
        """Denoising losses on the evaluation rows: with their captions, and with the empty caption (the floor)."""
        model, columns = self.model.eval(), self.collate(self.eval_dataset[:])
        floor = {**columns, "input_ids": self.model.empty_ids.cpu().expand_as(columns["input_ids"])}

        def loss(inputs: dict[str, torch.Tensor]) -> float:
            with torch.inference_mode():
                return model(**{name: tensor.to(self.args.device) for name, tensor in inputs.items()})["loss"].item()

        return {"denoising_loss": loss(columns), "denoising_loss_without_caption": loss(floor)}
