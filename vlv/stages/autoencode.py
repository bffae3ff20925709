"""Stage `autoencode` (stage 1): the encoder learns to write images down so that the frozen teacher can redraw them."""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL.Image import Image
from transformers import TrainingArguments

from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.data import Table, fixed_noise
from vlv.sheets import Pair, contact_sheet
from vlv.stages.vlv import VLVSettings, VLVStage


@dataclass
class AutoencodeSettings(VLVSettings):
    encoder: str | None = field(default=None, metadata={"help": "Without --model: folder or id of a Florence-2."})
    decoder: str | None = field(
        default=None, metadata={"help": "Without --model: folder or id of a Stable Diffusion."}
    )
    caption_head: str | None = field(
        default=None, metadata={"help": "Without --model: folder or id of the language model that stage 2 will train."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the rebuilt images (default: the UNet's)."}
    )
    crop: str | None = field(
        default=None,
        metadata={"help": "center: train on the centre of each image, as the paper does; else the whole."},
    )
    sample_latents: bool = field(
        default=True, metadata={"help": "Sample the VAE's latents rather than take their mean."}
    )
    denoising_loss: str = field(default="mse", metadata={"help": "mse or l1."})
    min_snr_gamma: float | None = field(default=None, metadata={"help": "Weight the loss by min(SNR, gamma)."})
    context_dropout: float = field(default=0.0, metadata={"help": "Share of contexts replaced by the empty prompt's."})


class SampledLatents(Table):
    """A Table whose `latent_mean` and `latent_std` are sampled as `latents`, anew in every epoch.

    What is drawn depends on the seed, the epoch and the row alone, so that a resumed run draws what the unbroken one
    would have drawn.
    """

    def __init__(self, seed: int, **columns: torch.Tensor):
        super().__init__(**columns)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[0] for name, column in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        batch = super().__getitems__(indices)
        mean, std = batch.pop("latent_mean"), batch.pop("latent_std")
        draws = [np.random.default_rng((self.seed, self.epoch, index)) for index in indices]
        noise = np.stack([draw.standard_normal(mean.shape[1:], dtype=np.float32) for draw in draws])
        return {**batch, "latents": mean + std * torch.from_numpy(noise)}


def mean_latents(table: Table) -> Table:
    """The table with `latents`, the posterior's mean, in place of `latent_mean` and `latent_std`."""
    columns = dict(table.columns)
    del columns["latent_std"]
    return Table(latents=columns.pop("latent_mean"), **columns)


class AutoencodeStage(VLVStage):
    Settings = AutoencodeSettings
    stage = "autoencode"

    def __init__(self, settings: AutoencodeSettings, args: TrainingArguments):
        super().__init__(settings, args)
        if settings.model is not None:
            self.model = self.load_model(VLVModel)
            self.processor = VLVProcessor.from_pretrained(self.source)
        elif settings.encoder and settings.decoder:
            parts = {name: getattr(settings, name) for name in ("encoder", "decoder", "caption_head", "image_size")}
            self.model = VLVModel.from_components(
                **parts, dtype=torch.float32, attn_implementation=settings.attn_implementation
            )
            self.processor = VLVProcessor.from_components(**parts, crop=settings.crop)
        else:
            raise ValueError("Nothing to start from: give --model, or --encoder and --decoder.")
        for name in ("sample_latents", "denoising_loss", "min_snr_gamma", "context_dropout"):
            setattr(self.model.config, name, getattr(settings, name))
        self.choose_parts()
        train, self.eval_rows = self.load_data()
        self.train_dataset = self.cache(train, latents=True, description="Encoding images")
        self.eval_dataset = self.cache(self.eval_rows, latents=True, description="Encoding evaluation images")
        if isinstance(self.train_dataset, Table):
            if settings.sample_latents:
                self.train_dataset = SampledLatents(**self.train_dataset.columns, seed=args.seed)
            else:
                self.train_dataset = mean_latents(self.train_dataset)
            # Evaluation takes the mean and brings its noise along, so that its losses can be compared.
            self.eval_dataset = mean_latents(self.eval_dataset)
            shape = self.eval_dataset.columns["latents"].shape[1:]
            timesteps = self.model.noise_scheduler.config.num_train_timesteps
            self.eval_dataset.columns |= fixed_noise(len(self.eval_rows), shape, timesteps)

    def collate(self, batch) -> dict[str, torch.Tensor]:
        return batch if isinstance(batch, dict) else torch.utils.data.default_collate(batch)

    def samples(self) -> Image:
        _, images, pixel_values = self.sample_rows()
        generators = [torch.Generator().manual_seed(number) for number in range(len(images))]
        rebuilt = self.model.eval().reconstruct(pixel_values=pixel_values, generator=generators)
        pairs = [Pair(image, reconstruction, "") for image, reconstruction in zip(images, rebuilt, strict=True)]
        return contact_sheet(pairs, "Reconstructions", "Each beside its original, from its caption embeddings alone.")

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """Denoising losses on the evaluation images: with their own context, and with the empty one, the floor."""
        if not isinstance(self.eval_dataset, Table):
            return {}
        model, total = self.model.eval(), {"denoising_loss": 0.0, "denoising_loss_with_empty_context": 0.0}
        for start in range(0, len(self.eval_dataset), 200):
            rows = torch.arange(start, min(start + 200, len(self.eval_dataset)))
            batch = {name: tensor.to(self.args.device) for name, tensor in self.eval_dataset[rows].items()}
            own = model(**batch).denoising_loss
            empty = model.empty_context().expand(len(rows), -1, -1)
            noise = {name: batch[name] for name in ("noise", "timesteps")}
            floor = model.compute_denoising_loss(batch["latents"], empty, **noise)
            for name, loss in zip(total, (own, floor), strict=True):
                total[name] += loss.item() * len(rows) / len(self.eval_dataset)
        return total
