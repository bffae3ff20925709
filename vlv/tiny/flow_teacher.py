"""Stage `flow_teacher`: a small Stable Diffusion 3, a flow-matching transformer, learns to draw from captions."""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from vlv.tiny.teacher import TeacherSettings, TeacherStage, TeacherTraining, tiny_text_encoder
from vlv.training.checks import require_at_least_1, require_multiples


@dataclass
class FlowTeacherSettings(TeacherSettings):
    width: int = field(default=128, metadata={"help": "Width of the transformer, a multiple of 32."})
    layers: int = field(default=6, metadata={"help": "Layers of the transformer."})
    patch_size: int = field(default=2, metadata={"help": "Side of a patch of latents, which makes one token."})

    def __post_init__(self):
        super().__post_init__()
        require_at_least_1(self, "layers", "patch_size")
        require_multiples(self, width=32, text_width=8)  # each of the two text encoders has half of text_width


def tiny_transformer(
    vae: AutoencoderKL, width: int, layers: int, patch_size: int, text_width: int
) -> SD3Transformer2DModel:
    """A randomly initialised transformer of Stable Diffusion 3.5's kind."""
    size = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    return SD3Transformer2DModel(
        sample_size=size,
        patch_size=patch_size,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=text_width,
        caption_projection_dim=width,
        pooled_projection_dim=text_width,
        pos_embed_max_size=size // patch_size,
        qk_norm="rms_norm",
    )


class FlowTeacherTraining(TeacherTraining):
    """The flow-matching loss on latents, given captions (arXiv 2403.03206)."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        # Kept, because sampling leaves a shorter table in the scheduler. That one runs from noise to image.
        self.register_buffer("sigmas", self.scheduler.sigmas.flip(0), persistent=False)

    def draw_timesteps(self, count: int) -> torch.Tensor:
        density = compute_density_for_timestep_sampling("logit_normal", count, logit_mean=0.0, logit_std=1.0)
        return (density * self.scheduler.config.num_train_timesteps).long()

    def predict(
        self,
        denoiser: nn.ModuleDict,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        input_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        read = [denoiser[name](input_ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
        # As in the pipeline: the second to last layer gives the context, the last layer the pooled vector.
        context = torch.cat([text.hidden_states[-2] for text in read], dim=-1)  # (B, L, E)
        pooled = torch.cat([text.text_embeds for text in read], dim=-1)  # (B, E)
        sigmas = self.sigmas[timesteps]
        share = sigmas[:, None, None, None]
        noisy = (1 - share) * latents + share * noise
        times = sigmas * self.scheduler.config.num_train_timesteps
        prediction = denoiser["transformer"](
            hidden_states=noisy, timestep=times, encoder_hidden_states=context, pooled_projections=pooled
        ).sample
        return prediction, noise - latents


class FlowTeacherStage(TeacherStage):
    Settings = FlowTeacherSettings
    settings: FlowTeacherSettings
    drawing = {"max_sequence_length": 0}  # there is no T5, and no zeros replace its tokens

    def build(self, empty_ids: torch.Tensor) -> TeacherTraining:
        settings = self.settings
        half = settings.text_width // 2
        side = self.vae.config.sample_size // 2 ** (len(self.vae.config.block_out_channels) - 1)
        if side % settings.patch_size:
            raise ValueError(
                f"patch_size is {settings.patch_size}, which does not divide the side of the VAE's latents, {side}."
            )

        def text_encoder() -> CLIPTextModelWithProjection:
            config: CLIPTextConfig = tiny_text_encoder(
                self.tokenizer, settings.max_length, half, settings.text_layers
            ).config
            return CLIPTextModelWithProjection(config)

        denoiser = {
            "transformer": tiny_transformer(
                self.vae, settings.width, settings.layers, settings.patch_size, settings.text_width
            ),
            "text_encoder": text_encoder(),
            "text_encoder_2": text_encoder(),
        }
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
        return FlowTeacherTraining(denoiser, scheduler, empty_ids, settings.caption_dropout)

    def pipeline(self) -> StableDiffusion3Pipeline:
        self.vae.register_to_config(shift_factor=self.vae.config.shift_factor or 0.0)  # the pipeline adds it
        return StableDiffusion3Pipeline(
            **self.model.average.eval(),
            vae=self.vae.to(self.args.device),
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
            scheduler=self.model.scheduler,
        )
