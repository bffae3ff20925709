"""
What a VLV asks of a frozen text-to-image teacher, without its weights: the base of one class per diffusers pipeline.

`families_vlv.py` holds the classes. The modules themselves are attributes of `VLVModel`, under diffusers' component
names (`unet` or `transformer`, `vae`). The denoising loss calls the denoiser directly. Sampling calls diffusers' own
pipeline with prompt embeddings. Timesteps are integers 0..T-1 in every family, and a larger one is noisier.
"""

import inspect
import math
from typing import Any, ClassVar, NamedTuple

import diffusers
import torch

try:
    from .layers_vlv import cast_for, device_of, restore_tables
except ImportError:
    from layers_vlv import cast_for, device_of, restore_tables


class Prompt(NamedTuple):
    """What conditions a denoiser: B prompts of L embeddings, E wide."""

    context: torch.Tensor  # (B, L, E)
    mask: torch.Tensor  # (B, L) bool; False where a shorter prompt is padded
    pooled: torch.Tensor | None = None  # (B, P), in families that also read one vector per prompt

    def to(self, denoiser: torch.nn.Module) -> "Prompt":
        """On the device and in the dtype of the denoiser that reads it."""
        pooled = None if self.pooled is None else cast_for(denoiser, self.pooled)
        context = cast_for(denoiser, self.context)
        return Prompt(context, self.mask.to(context.device), pooled)

    def replace(self, dropped: torch.Tensor, other: "Prompt") -> "Prompt":
        """The other prompt (of one row) in the rows that are `dropped`, (B, 1, 1)."""
        rows = dropped[:, :, 0]
        pooled = self.pooled if other.pooled is None else torch.where(rows, other.pooled, self.pooled)
        return Prompt(
            torch.where(dropped, other.context, self.context), torch.where(rows, other.mask, self.mask), pooled
        )

    def repeat(self, times: int) -> "Prompt":
        """Each prompt so many times in a row: B times as many."""
        return Prompt(*(part if part is None else part.repeat_interleave(times, 0) for part in self))


class Decoder:
    """
    Describes one teacher. A subclass describes a family.

    Args:
        config (`dict`): `decoder_config` of [`VLVConfig`]: a plain diffusers dictionary for the denoiser, `vae` and
            `scheduler`, and the pipeline's name as `_class_name`.
    """

    pipeline: ClassVar[str]  # the name of diffusers' class
    denoiser: ClassVar[str] = "transformer"
    denoiser_class: ClassVar[str]  # where the config does not name it
    vae_class: ClassVar[str] = "AutoencoderKL"
    width_key: ClassVar[str]  # of the denoiser's config: the context's width E
    reads_text_encoder: ClassVar[bool] = False  # caption embeddings pass through the pipeline's own text encoder
    call: ClassVar[dict[str, Any]] = {}  # arguments that every call of the pipeline gets

    def __init__(self, config: dict):
        self.config = config
        self.model_config = config[self.denoiser]
        self.vae_config = config["vae"]
        with torch.device("cpu"):  # its tables are not weights and must never be on the meta device
            self.prepare_schedule()

    # ---- sizes ---------------------------------------------------------------------------------------------

    @property
    def context_width(self) -> int:
        """Width E of the context that the denoiser attends to."""
        return self.model_config.get(self.width_key)

    @property
    def pooled_width(self) -> int | None:
        """Width P of the pooled vector, in families that read one."""
        return None

    @property
    def positions(self) -> int | None:
        """How many embeddings a context may have at most; `None`: any number."""
        return None

    @property
    def factor(self) -> int:
        """Pixels of a side that make one latent."""
        return 2 ** (len(self.vae_config.get("block_out_channels", (64,))) - 1)

    @property
    def multiple(self) -> int:
        """Heights and widths in pixels are multiples of this."""
        return math.lcm(8, self.factor * (self.model_config.get("patch_size") or 1))

    @property
    def image_size(self) -> int:
        """Pixels of a side that the teacher was trained at."""
        return self.model_config.get("sample_size", 128) * self.factor

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of the VAE's latents, and those that the denoiser reads, which must be as many."""
        return self.vae_config.get("latent_channels", 4), self.model_config.get("in_channels", 4)

    def check(self, config: Any) -> None:
        """Raises ValueError where the teacher's parts do not fit each other, or not the rest of a [`VLVConfig`]."""
        has_text_encoder = config.text_encoder_config is not None
        if has_text_encoder != self.reads_text_encoder:
            needs = "needs its text_encoder_config" if self.reads_text_encoder else "has context_width in its place"
            raise ValueError(f"A VLV with {self.pipeline} {needs}: read the parts with VLVModel.from_components.")
        if self.context_width != config.caption_embeds_width:
            owner = "text encoder is" if has_text_encoder else "caption embeddings are"
            raise ValueError(
                f"The {owner} {config.caption_embeds_width} wide, but the {self.name} attends to a context of width "
                f"{self.context_width}: take both from the same diffusion model."
            )
        latent, read = self.channels
        if latent != read:
            raise ValueError(
                f"The VAE's latents have {latent} channels, but the {self.name} reads {read}: "
                "take both from the same diffusion model."
            )
        if self.positions is not None and config.num_queries > self.positions:
            raise ValueError(
                f"num_queries is {config.num_queries}, but the {self.name} has positions for a context of "
                f"{self.positions}: choose between 1 and {self.positions}."
            )
        if config.image_size is not None:
            self.check_size(config.image_size, config.image_size)
        self.check_scheduler(self.config["scheduler"].get("_class_name", ""), self.config["scheduler"])

    @property
    def name(self) -> str:
        """What messages call the denoiser."""
        return "UNet" if self.denoiser == "unet" else "transformer"

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError for a picture that the teacher cannot draw."""
        if height % self.multiple or width % self.multiple or min(height, width) < 1:
            near = (self.multiple * max(1, round(side / self.multiple)) for side in (height, width))
            raise ValueError(
                f"The picture is {height}x{width} pixels, but {self.pipeline} draws multiples of {self.multiple}: "
                f"choose a height and width such as {' and '.join(map(str, near))}."
            )

    # ---- modules -------------------------------------------------------------------------------------------

    def classes(self) -> dict[str, type[torch.nn.Module]]:
        """diffusers' classes of the denoiser and the VAE, under their component names."""
        names = {
            self.denoiser: self.model_config.get("_class_name", self.denoiser_class),
            "vae": self.vae_config.get("_class_name", self.vae_class),
        }
        return {part: getattr(diffusers, name) for part, name in names.items()}

    def build(self) -> dict[str, torch.nn.Module]:
        """The denoiser and the VAE, randomly initialised."""
        return {part: model.from_config(self.config[part]) for part, model in self.classes().items()}

    def restore_tables(self, part: str, module: torch.nn.Module) -> None:
        """Computes again what a checkpoint does not hold of the denoiser or the VAE (see `layers_vlv.py`)."""
        restore_tables(module, lambda: self.classes()[part].from_config(self.config[part]))

    # ---- images and latents --------------------------------------------------------------------------------

    def latent_distribution(self, vae: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (B, 3, h, w) in -1..1 -> mean and standard deviation of their latents, in the denoiser's scale."""
        posterior = vae.encode(pixels).latent_dist
        return self.normalise(vae, posterior.mean), self.rescale(vae, posterior.std)

    def encode_latents(self, vae: torch.nn.Module, pixels: torch.Tensor, sample: bool) -> torch.Tensor:
        """Pixels (B, 3, h, w) in -1..1 -> latents (B, C, h/f, w/f) in the denoiser's scale."""
        posterior = vae.encode(pixels).latent_dist
        return self.normalise(vae, posterior.sample() if sample else posterior.mean)

    def decode_latents(self, vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """Latents in the denoiser's scale -> pixels (B, 3, h, w), about -1..1."""
        latents = latents.to(device_of(vae), latents.dtype)
        return vae.decode(cast_for(vae, self.denormalise(vae, latents))).sample

    def finish(self, vae: torch.nn.Module, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """What the pipeline returns for `output_type="latent"` -> pixels (B, 3, height, width), about -1..1."""
        return self.decode_latents(vae, latents)

    def statistics(self, vae: torch.nn.Module) -> tuple[Any, Any]:
        """Shift and scale between the VAE's latents and the denoiser's: numbers, or tensors (1, C, 1, 1)."""
        return vae.config.shift_factor or 0.0, vae.config.scaling_factor

    def normalise(self, vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents in the denoiser's scale."""
        shift, scale = self.statistics(vae)
        return (latents - shift) * scale

    def rescale(self, vae: torch.nn.Module, deviation: torch.Tensor) -> torch.Tensor:
        """The VAE's standard deviations in the denoiser's scale."""
        return deviation * self.statistics(vae)[1]

    def denormalise(self, vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """Latents in the denoiser's scale as the VAE's."""
        shift, scale = self.statistics(vae)
        return latents / scale + shift

    # ---- the objective -------------------------------------------------------------------------------------

    num_timesteps: int

    def prepare_schedule(self) -> None:
        """Makes the tables of the noise schedule, on the CPU."""
        raise NotImplementedError

    def check_scheduler(self, name: str, config: Any) -> None:
        """Raises ValueError for a scheduler of the other kind."""
        raise NotImplementedError

    def sampler(self) -> Any:
        """The scheduler that sampling takes by default: the family's own."""
        settings = self.config["scheduler"]
        return getattr(diffusers, settings["_class_name"]).from_config(settings)

    def draw_timesteps(self, count: int, density: str, shift: float, device: torch.device) -> torch.Tensor:
        """
        Timesteps (count,) to train on, int64 in 0..T-1. Any `density` but `"uniform"` is one of diffusers'
        `compute_density_for_timestep_sampling`, with the defaults of its training scripts (arXiv 2403.03206). `shift`
        then moves them (see the config's `timestep_shift`).
        """
        number = self.num_timesteps
        if density == "uniform":
            timesteps = torch.randint(number, (count,), device=device)
        else:
            from diffusers.training_utils import compute_density_for_timestep_sampling as sample

            share = sample(density, count, logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
            timesteps = (number - 1 - (share * number).long()).clamp(min=0).to(device)
        if shift == 1:
            return timesteps
        time = (timesteps + torch.rand(count, device=device)) / number
        return (shift * time / (1 + (shift - 1) * time) * number).long().clamp(max=number - 1)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy latents, shaped as `latents`."""
        raise NotImplementedError

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser should predict of the noisy latents."""
        raise NotImplementedError

    def snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """min-SNR weights (B,) of the loss (arXiv 2303.09556)."""
        raise NotImplementedError

    # ---- the denoiser --------------------------------------------------------------------------------------

    def time(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The time that the denoiser reads for integer timesteps (B,)."""
        return timesteps

    def denoise(
        self, module: torch.nn.Module, noisy: torch.Tensor, time: torch.Tensor, prompt: Prompt
    ) -> torch.Tensor:
        """The prediction (B, C, h/f, w/f) that `target` is compared with."""
        raise NotImplementedError

    # ---- diffusers' own pipeline ---------------------------------------------------------------------------

    def make_pipeline(self, scheduler: Any = None, **components: Any) -> "diffusers.DiffusionPipeline":
        """diffusers' pipeline of these components; those that are not given are `None`."""
        pipeline_class = getattr(diffusers, self.pipeline)
        signature = inspect.signature(pipeline_class.__init__).parameters
        needed = [name for name, entry in signature.items() if name != "self" and entry.default is entry.empty]
        settings = {"requires_safety_checker": False} if "requires_safety_checker" in signature else {}
        # The constructor of some pipelines rewrites the scheduler that it is given, so this one is set afterwards.
        pipeline = pipeline_class(**dict.fromkeys(needed) | {"scheduler": self.sampler()} | settings | components)
        pipeline.register_modules(scheduler=self.sampler() if scheduler is None else scheduler)
        return pipeline

    def prompt(self, prompt: Prompt, empty: Prompt | None) -> dict[str, Any]:
        """The arguments of the pipeline's call for a prompt and the unconditional one."""
        arguments: dict[str, Any] = {"prompt_embeds": prompt.context, **self.call}
        if empty is not None:
            arguments["negative_prompt_embeds"] = empty.context
        return arguments

    def guidance(self, scale: float) -> dict[str, Any]:
        """The arguments of the pipeline's call for a guidance scale, of which 1 is none."""
        return {"guidance_scale": scale}

    def encode_empty_prompt(self, pipeline: "diffusers.DiffusionPipeline") -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The empty prompt through the pipeline's text encoders: embeddings (1, L, E) without padding, and the pooled
        vector (1, P) or `None`. The pipeline's denoiser and VAE are on the meta device.
        """
        raise NotImplementedError


class NoiseDecoder(Decoder):
    """A teacher that predicts the noise or the velocity on a variance-preserving schedule (arXiv 2006.11239)."""

    prediction_types = ("epsilon", "v_prediction")

    def prepare_schedule(self):
        self.schedule = diffusers.DDPMScheduler.from_config(self.config["scheduler"])
        self.num_timesteps = self.schedule.config.num_train_timesteps

    def check_scheduler(self, name, config):
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in self.prediction_types or is_flow(name, config):
            kind = f"predicts {prediction!r}" if prediction not in self.prediction_types else f"is a {name}"
            raise ValueError(f"The scheduler {kind}; VLV trains with {' or '.join(self.prediction_types)}.")

    def add_noise(self, latents, noise, timesteps):
        return self.schedule.add_noise(latents, noise, timesteps)

    @property
    def is_velocity(self):
        return self.schedule.config.prediction_type == "v_prediction"

    def target(self, latents, noise, timesteps):
        return self.schedule.get_velocity(latents, noise, timesteps) if self.is_velocity else noise

    def snr_weights(self, timesteps, gamma):
        from diffusers.training_utils import compute_snr  # imported late: it brings a large part of diffusers along

        snr = compute_snr(self.schedule, timesteps)
        return snr.clamp(max=gamma) / (snr + 1 if self.is_velocity else snr.clamp(min=1e-8))


class FlowDecoder(Decoder):
    """A teacher of rectified flow (arXiv 2403.03206): x_t = (1 - s) x + s n, and it predicts n - x."""

    def prepare_schedule(self):
        settings = self.config["scheduler"]
        self.num_timesteps = settings.get("num_train_timesteps", 1000)
        # A shift that depends on the picture's size is for sampling: the official training scripts leave it out.
        shift = 1.0 if settings.get("use_dynamic_shifting") else self.shift(settings)
        sigmas = diffusers.FlowMatchEulerDiscreteScheduler(self.num_timesteps, shift).sigmas
        self.sigmas = sigmas.flip(0)  # its table runs from noise to image

    def shift(self, settings):
        return settings.get("shift", 1.0)

    def check_scheduler(self, name, config):
        if not is_flow(name, config):
            raise ValueError(
                f"{name or 'The scheduler'} is not a flow-matching scheduler, but {self.pipeline} is a flow-matching "
                "teacher: take FlowMatchEulerDiscreteScheduler, or another with use_flow_sigmas."
            )

    def shares(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The noise's share s (B,) at integer timesteps, float32: half precision cannot tell neighbours apart."""
        return self.sigmas.to(timesteps.device)[timesteps]

    def time(self, timesteps):
        return self.shares(timesteps) * self.num_timesteps

    def add_noise(self, latents, noise, timesteps):
        share = self.shares(timesteps)[:, None, None, None]
        return (1 - share) * latents + share * noise

    def target(self, latents, noise, timesteps):
        return noise - latents

    def snr_weights(self, timesteps, gamma):
        share = self.shares(timesteps)
        return (((1 - share) / share) ** 2).clamp(max=gamma) * share**2


class PooledPrompt(Decoder):
    """What the families share that also read a pooled vector."""

    def prompt(self, prompt, empty):
        arguments = super().prompt(prompt, empty) | {"pooled_prompt_embeds": prompt.pooled}
        if empty is not None:
            arguments["negative_pooled_prompt_embeds"] = empty.pooled
        return arguments


class MaskedPrompt(Decoder):
    """What the families share whose prompts are padded, with a mask."""

    mask_name = "prompt_attention_mask"

    def prompt(self, prompt, empty):
        # A long dtype, because the pipelines' own tokenizers give masks as such.
        arguments = super().prompt(prompt, empty) | {self.mask_name: prompt.mask.long()}
        if empty is not None:
            arguments[f"negative_{self.mask_name}"] = empty.mask.long()
        return arguments

    def encode_empty_prompt(self, pipeline):
        arguments: dict[str, Any] = {"negative_prompt": ""} | self.encoding
        _, _, context, mask = pipeline.encode_prompt("", device="cpu", **arguments)
        return context[:, mask[0].bool()], None

    encoding: dict[str, Any] = {}  # what `encode_prompt` needs besides


def is_flow(name: str, config: Any) -> bool:
    """Whether a scheduler is one of flow matching."""
    flow = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    return name.startswith("FlowMatch") or bool(flow)


__all__ = ["Decoder", "FlowDecoder", "MaskedPrompt", "NoiseDecoder", "PooledPrompt", "Prompt", "is_flow"]
