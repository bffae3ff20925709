"""Stage `vae`: a small AutoencoderKL learns to compress images, by default fourfold in each direction."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import TrainingArguments

from vlv.training.average import MovingAverage
from vlv.training.checks import require_at_least_1, require_multiples
from vlv.training.examples import Table, in_batches, to_unit_range
from vlv.training.stage import Settings, Stage


@dataclass
class VAESettings(Settings):
    image_size: int = field(
        default=32, metadata={"help": "Side of the images in pixels, which each of `widths` but the first halves."}
    )
    widths: list[int] = field(
        default_factory=lambda: [16, 32, 64],
        metadata={"help": "Channels of each level, multiples of 8; each but the first halves height and width."},
    )
    latent_channels: int = field(default=4, metadata={"help": "Channels of the latents."})
    foreground_weight: float = field(
        default=7.0, metadata={"help": "Extra weight of pixels that do not have the background colour of their image."}
    )
    kl_weight: float = field(default=1e-6, metadata={"help": "Weight of the latents' divergence from N(0, 1)."})
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of the moving average of the weights."})

    def __post_init__(self):
        require_at_least_1(self, "latent_channels")
        require_multiples(self, widths=8)
        require_multiples(self, image_size=2 ** (len(self.widths) - 1))


def tiny_vae(image_size: int, widths: Sequence[int], latent_channels: int) -> AutoencoderKL:
    """A randomly initialised AutoencoderKL."""
    return AutoencoderKL(
        sample_size=image_size,
        block_out_channels=tuple(widths),
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        scaling_factor=1.0,
    )


class VAETraining(nn.Module):
    """The training loss of a VAE: weighted L1 + L2 reconstruction, and a little Kullback-Leibler divergence."""

    def __init__(self, vae: AutoencoderKL, foreground_weight: float, kl_weight: float):
        super().__init__()
        self.vae = vae
        self.average = deepcopy(vae).requires_grad_(False)
        self.foreground_weight, self.kl_weight = foreground_weight, kl_weight

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """pixel_values: (B, 3, H, W) in -1..1; evaluation uses the average weights and the mean latents."""
        vae = self.vae if self.training else self.average
        posterior = vae.encode(pixel_values).latent_dist
        decoded = vae.decode(posterior.sample() if self.training else posterior.mode()).sample.float()

        error = decoded - pixel_values
        weight = 1 + (self.foreground_weight - 1) * foreground(pixel_values)
        reconstruction = (weight * (error.abs() + error.square())).mean() / weight.mean()
        divergence = self.kl_weight * posterior.kl().mean()
        return {"loss": reconstruction + divergence, "reconstruction_loss": reconstruction, "kl_loss": divergence}


def foreground(pixel_values: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W): 1 where a pixel differs from the background (the median colour) of its image, else 0."""
    background = pixel_values.flatten(2).median(dim=-1).values[:, :, None, None]
    return ((pixel_values - background).abs().amax(dim=1, keepdim=True) > 0.1).float()


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Rescales the VAE's 1x1 convolutions, so that its latents have zero mean and unit variance per channel.

    Decoding reverses this exactly. Reconstructions do not change, and users of the VAE do not need the statistics.

    Args:
        mean, std: (latent_channels,), measured on the VAE's latents.
    """
    channels = len(mean)
    to_moments, from_latents = vae.quant_conv, vae.post_quant_conv
    to_moments.weight[:channels] /= std[:, None, None, None]
    to_moments.bias[:channels] = (to_moments.bias[:channels] - mean) / std
    to_moments.bias[channels:] -= 2 * std.log()  # the other half of the moments is the log variance
    from_latents.bias += from_latents.weight[:, :, 0, 0] @ mean
    from_latents.weight *= std[None, :, None, None]


class VAEStage(Stage):
    Settings = VAESettings

    def __init__(self, settings: VAESettings, args: TrainingArguments):
        super().__init__(settings, args)
        vae = tiny_vae(settings.image_size, settings.widths, settings.latent_channels)
        self.model = VAETraining(vae, settings.foreground_weight, settings.kl_weight)

    def prepare(self) -> None:
        self.train_dataset, self.eval_dataset = (
            Table(images=self.read_images(rows, self.settings.image_size)[1]) for rows in self.load_data()
        )

    def parts(self) -> dict[str, nn.Module]:
        return {"vae": self.model.vae, "average": self.model.average}

    def collate(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"pixel_values": to_unit_range(batch["images"])}

    def state(self) -> dict[str, torch.Tensor]:
        average = self.model.average.named_parameters(prefix="average")
        return super().state() | dict(average)

    def callbacks(self) -> list:
        trained, average = self.model.vae.parameters(), self.model.average.parameters()
        return [MovingAverage(trained, average, self.settings.ema_decay)]

    def save(self, folder: Path) -> None:
        vae = self.model.average.eval()
        images = self.train_dataset.columns["images"][:2000]
        (means,) = in_batches(
            lambda batch: (vae.encode(to_unit_range(batch)).latent_dist.mode(),),
            images,
            vae.device,
            description="Latents",
        )
        fold_latent_statistics(vae, means.mean((0, 2, 3)).to(vae.device), means.std((0, 2, 3)).to(vae.device))
        vae.save_pretrained(folder)

    def evaluate(self) -> dict[str, float]:
        """Peak signal-to-noise ratio on the evaluation images, over all pixels and over the foreground alone."""
        vae = self.model.average.eval()

        def errors(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            pixel_values = to_unit_range(images)
            latents = vae.encode(pixel_values).latent_dist.mode()
            squared = (vae.decode(latents).sample.clamp(-1, 1) - pixel_values).square().mean(1, keepdim=True)
            mask = foreground(pixel_values)
            return squared.mean((1, 2, 3)), (squared * mask).sum((1, 2, 3)), mask.sum((1, 2, 3)), latents

        images = self.eval_dataset.columns["images"]
        everywhere, on_foreground, area, latents = in_batches(errors, images, vae.device, 100, "Evaluating")
        metrics = {"psnr": psnr(everywhere.mean())}
        if area.any():  # an image of one colour has no foreground
            metrics["psnr_foreground"] = psnr(on_foreground.sum() / area.sum())
        return metrics | {"latent_mean": latents.mean().item(), "latent_std": latents.std().item()}


def psnr(mean_squared_error: torch.Tensor) -> float:
    """In decibels, for values in -1..1."""
    return (10 * torch.log10(4 / mean_squared_error)).item()
