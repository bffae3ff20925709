"""The teachers that a VLV can train with: one small class per diffusers pipeline (see `decoders_vlv.py`)."""

import math

import diffusers
import torch
import torch.nn.functional as F

try:
    from .decoders_vlv import Decoder, FlowDecoder, MaskedPrompt, NoiseDecoder, PooledPrompt
    from .layers_vlv import cast_for
except ImportError:
    from decoders_vlv import Decoder, FlowDecoder, MaskedPrompt, NoiseDecoder, PooledPrompt
    from layers_vlv import cast_for


class StableDiffusion(NoiseDecoder):
    """Stable Diffusion 1.x and 2.x (arXiv 2112.10752). Caption embeddings pass through its CLIP text encoder."""

    pipeline = "StableDiffusionPipeline"
    denoiser = "unet"
    denoiser_class = "UNet2DConditionModel"
    width_key = "cross_attention_dim"
    reads_text_encoder = True

    def sampler(self):
        # Second-order DPM-Solver++ (arXiv 2211.01095) needs the fewest steps (docs/results.md).
        return diffusers.DPMSolverMultistepScheduler.from_config(self.config["scheduler"])

    def denoise(self, module, noisy, time, prompt):
        return module(noisy, time, encoder_hidden_states=prompt.context).sample


class StableDiffusionXL(PooledPrompt, NoiseDecoder):
    """Stable Diffusion XL (arXiv 2307.01952), which also reads the picture's size."""

    pipeline = "StableDiffusionXLPipeline"
    denoiser = "unet"
    denoiser_class = "UNet2DConditionModel"
    width_key = "cross_attention_dim"

    @property
    def pooled_width(self):
        sizes = 6  # original height and width, the crop's top and left, target height and width
        config = self.model_config
        return config["projection_class_embeddings_input_dim"] - sizes * config["addition_time_embed_dim"]

    def denoise(self, module, noisy, time, prompt):
        height, width = (side * self.factor for side in noisy.shape[2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=noisy.device).to(prompt.context.dtype)
        added = {"text_embeds": prompt.pooled, "time_ids": sizes.expand(len(noisy), -1)}
        return module(noisy, time, encoder_hidden_states=prompt.context, added_cond_kwargs=added).sample

    def encode_empty_prompt(self, pipeline):
        _, context, _, pooled = pipeline.encode_prompt("", device="cpu")  # zeros, where the pipeline's config says so
        return context, pooled

    def statistics(self, vae):
        if vae.config.latents_mean is None or vae.config.latents_std is None:
            return super().statistics(vae)
        mean, scale = _per_channel(vae)
        return mean, vae.config.scaling_factor * scale


class StableDiffusion3(PooledPrompt, FlowDecoder):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206)."""

    pipeline = "StableDiffusion3Pipeline"
    denoiser_class = "SD3Transformer2DModel"
    width_key = "joint_attention_dim"

    @property
    def pooled_width(self):
        return self.model_config["pooled_projection_dim"]

    def denoise(self, module, noisy, time, prompt):
        return module(
            hidden_states=noisy, timestep=time, encoder_hidden_states=prompt.context, pooled_projections=prompt.pooled
        ).sample

    def encode_empty_prompt(self, pipeline):
        _, context, _, pooled = pipeline.encode_prompt("", None, None, device="cpu")
        return context, pooled


class Lumina2(MaskedPrompt, FlowDecoder):
    """Lumina-Image 2.0 (arXiv 2503.21758). Its time runs from noise to image, and so does its prediction."""

    pipeline = "Lumina2Pipeline"
    denoiser_class = "Lumina2Transformer2DModel"
    width_key = "cap_feat_dim"

    @property
    def positions(self):
        return self.model_config["axes_lens"][0] - 1  # the image's own position follows those of the context

    @property
    def multiple(self):
        return 8 * self.model_config["patch_size"]  # the pipeline takes a factor of 8 for granted

    def time(self, timesteps):
        return 1 - self.shares(timesteps)

    def denoise(self, module, noisy, time, prompt):
        return -module(
            hidden_states=noisy,
            timestep=time,
            encoder_hidden_states=prompt.context,
            encoder_attention_mask=prompt.mask,
        ).sample


class ZImage(FlowDecoder):
    """Z-Image (arXiv 2511.22699). It reads lists, and its time and prediction run from noise to image."""

    pipeline = "ZImagePipeline"
    denoiser_class = "ZImageTransformer2DModel"
    width_key = "cap_feat_dim"

    @property
    def positions(self):
        return (self.model_config["axes_lens"][0] - 2) // 32 * 32  # contexts are padded to multiples of 32

    @property
    def multiple(self):
        return 2 * self.factor

    @property
    def image_size(self):
        return 1024  # the pipeline's own; the transformer's config has none

    def time(self, timesteps):
        return 1 - self.shares(timesteps)

    def denoise(self, module, noisy, time, prompt):
        return -torch.stack(module(list(noisy[:, :, None]), time, _unpadded(prompt)).sample)[:, :, 0]

    def prompt(self, prompt, empty):
        arguments = {"prompt_embeds": _unpadded(prompt)}
        return arguments if empty is None else arguments | {"negative_prompt_embeds": _unpadded(empty)}

    def guidance(self, scale):
        return {
            "guidance_scale": max(scale - 1.0, 0.0)
        }  # its pipeline counts from 0: positive + s (positive - negative)

    def encode_empty_prompt(self, pipeline):
        _, contexts = pipeline.encode_prompt("", device="cpu")
        return contexts[0][None], None


class Sana(MaskedPrompt, FlowDecoder):
    """Sana (arXiv 2410.10629), on the latents of a deep compression auto-encoder, which has no posterior to sample."""

    pipeline = "SanaPipeline"
    denoiser_class = "SanaTransformer2DModel"
    vae_class = "AutoencoderDC"
    width_key = "caption_channels"
    call = {"use_resolution_binning": False, "negative_prompt": None}
    # The default puts an instruction for users' short prompts in front. The empty prompt has none in training either.
    encoding = {"complex_human_instruction": None}

    @property
    def factor(self):
        return 2 ** (len(self.vae_config["encoder_block_out_channels"]) - 1)

    @property
    def multiple(self):
        return math.lcm(32, super().multiple)

    def shift(self, settings):
        return settings.get("flow_shift", 1.0) if "flow_shift" in settings else super().shift(settings)

    def time(self, timesteps):
        return super().time(timesteps) * self.model_config.get("timestep_scale", 1.0)

    def denoise(self, module, noisy, time, prompt):
        return module(
            noisy, encoder_hidden_states=prompt.context, encoder_attention_mask=prompt.mask.long(), timestep=time
        ).sample

    def encode_latents(self, vae, pixels, sample):
        return self.normalise(vae, vae.encode(pixels).latent)

    def latent_distribution(self, vae, pixels):
        latents = self.encode_latents(vae, pixels, False)
        return latents, torch.zeros_like(latents)

    def statistics(self, vae):
        return 0.0, vae.config.scaling_factor


class PixArtSigma(MaskedPrompt, NoiseDecoder):
    """PixArt-Sigma (arXiv 2403.04692), whose upper channels predict a variance that no loss here reads."""

    pipeline = "PixArtSigmaPipeline"
    denoiser_class = "PixArtTransformer2DModel"
    width_key = "caption_channels"
    call = {"use_resolution_binning": False, "negative_prompt": None}

    def denoise(self, module, noisy, time, prompt):
        prediction = module(
            noisy,
            encoder_hidden_states=prompt.context,
            encoder_attention_mask=prompt.mask.long(),
            timestep=time,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return prediction[:, : noisy.shape[1]]


class _Packed(FlowDecoder):
    """What the families share that read 2x2 patches as a sequence, and sigma as their time."""

    def time(self, timesteps):
        return self.shares(timesteps)

    @property
    def image_size(self):
        return 1024  # 128 latents of 8 pixels, which the pipelines take for granted


class Flux2Klein(_Packed):
    """FLUX.2 klein: 2x2 patches of latents, normalised by statistics that its VAE holds."""

    pipeline = "Flux2KleinPipeline"
    denoiser_class = "Flux2Transformer2DModel"
    vae_class = "AutoencoderKLFlux2"
    width_key = "joint_attention_dim"

    @property
    def factor(self):
        return 2 * super().factor

    @property
    def multiple(self):
        return self.factor

    @property
    def channels(self):
        return 4 * self.vae_config.get("latent_channels", 32), self.model_config.get("in_channels", 128)

    def denoise(self, module, noisy, time, prompt):
        count, _, height, width = noisy.shape
        device = noisy.device
        one = torch.zeros(1, device=device, dtype=torch.long)
        places = torch.cartesian_prod(one, *(torch.arange(side, device=device) for side in (height, width)), one)
        words = torch.cartesian_prod(one, one, one, torch.arange(prompt.context.shape[1], device=device))
        prediction = module(
            hidden_states=noisy.flatten(2).mT,
            timestep=time,
            guidance=None,
            encoder_hidden_states=prompt.context,
            txt_ids=words.expand(count, -1, -1),
            img_ids=places.expand(count, -1, -1),
        ).sample
        return prediction.mT.unflatten(2, (height, width))

    def statistics(self, vae):
        mean, variance = (values.view(1, -1, 1, 1) for values in (vae.bn.running_mean, vae.bn.running_var))
        return mean, 1 / (variance + vae.config.batch_norm_eps).sqrt()

    def normalise(self, vae, latents):
        return super().normalise(vae, F.pixel_unshuffle(latents, 2))

    def rescale(self, vae, deviation):
        return super().rescale(vae, F.pixel_unshuffle(deviation, 2))

    def denormalise(self, vae, latents):
        return F.pixel_shuffle(super().denormalise(vae, latents), 2)

    def finish(self, vae, latents, height, width):
        return vae.decode(cast_for(vae, latents)).sample  # this pipeline has undone both by then

    def encode_empty_prompt(self, pipeline):
        return pipeline.encode_prompt("", device="cpu")[0], None


class QwenImage(MaskedPrompt, _Packed):
    """Qwen-Image (arXiv 2508.02324), on the latents of a video VAE, one frame long."""

    pipeline = "QwenImagePipeline"
    denoiser_class = "QwenImageTransformer2DModel"
    vae_class = "AutoencoderKLQwenImage"
    width_key = "joint_attention_dim"
    mask_name = "prompt_embeds_mask"

    @property
    def factor(self):
        return 2 ** len(self.vae_config["temperal_downsample"])

    @property
    def multiple(self):
        return 2 * self.factor

    @property
    def channels(self):
        return self.vae_config["z_dim"], self.model_config["in_channels"] // 4

    def denoise(self, module, noisy, time, prompt):
        height, width = (side // 2 for side in noisy.shape[2:])
        prediction = module(
            hidden_states=F.pixel_unshuffle(noisy, 2).flatten(2).mT,
            timestep=time,
            guidance=None,
            encoder_hidden_states=prompt.context,
            encoder_hidden_states_mask=None if prompt.mask.all() else prompt.mask.long(),
            img_shapes=[[(1, height, width)]] * len(noisy),
        ).sample
        return F.pixel_shuffle(prediction.mT.unflatten(2, (height, width)), 2)

    def guidance(self, scale):
        return {"true_cfg_scale": scale}

    def encode_latents(self, vae, pixels, sample):
        return super().encode_latents(vae, pixels[:, :, None], sample)

    def latent_distribution(self, vae, pixels):
        return super().latent_distribution(vae, pixels[:, :, None])

    def statistics(self, vae):
        return _per_channel(vae)

    def normalise(self, vae, latents):
        return super().normalise(vae, latents[:, :, 0])

    def rescale(self, vae, deviation):
        return super().rescale(vae, deviation[:, :, 0])

    def denormalise(self, vae, latents):
        return super().denormalise(vae, latents)[:, :, None]

    def decode_latents(self, vae, latents):
        return super().decode_latents(vae, latents)[:, :, 0]

    def finish(self, vae, latents, height, width):
        latents = latents.mT.unflatten(2, (height // self.multiple, width // self.multiple))
        return self.decode_latents(vae, F.pixel_shuffle(latents, 2))

    def encode_empty_prompt(self, pipeline):
        context, mask = pipeline.encode_prompt("", device="cpu")
        return context if mask is None else context[:, mask[0].bool()], None


_NOISE = (StableDiffusion, StableDiffusionXL, PixArtSigma)
_FLOW = (StableDiffusion3, Lumina2, ZImage, Sana, Flux2Klein, QwenImage)
FAMILIES: dict[str, type[Decoder]] = {family.pipeline: family for family in _NOISE + _FLOW}


def family_of(config: dict) -> type[Decoder]:
    """The class that describes a teacher. Raises ValueError for one that is not known, or too new for diffusers."""
    name = config.get("_class_name", StableDiffusion.pipeline)
    if name not in FAMILIES:
        raise ValueError(f"{name} is not a teacher that VLV knows: it knows {', '.join(FAMILIES)}.")
    if name not in dir(diffusers):  # asked for by name alone: a pipeline takes seconds to import
        raise ValueError(
            f"diffusers {diffusers.__version__} has no {name}: install a newer one with pip install -U diffusers."
        )
    return FAMILIES[name]


def build_decoder(config: dict) -> Decoder:
    """
    The object that describes a teacher, without weights, from `decoder_config` of [`VLVConfig`].

    Raises:
        ValueError: the family is not known, or a part of the teacher is missing.
    """
    family = family_of(config)
    parts = (family.denoiser, "vae", "scheduler")
    if missing := sorted(set(parts) - config.keys()):
        raise ValueError(
            f"decoder_config lacks {', '.join(missing)}: for {family.pipeline} it holds {', '.join(parts)}."
        )
    return family(config)


def _unpadded(prompt):
    """The embeddings (L, E) of each prompt, without those that pad it."""
    if prompt.mask.all():
        return list(prompt.context)
    return [context[mask] for context, mask in zip(prompt.context, prompt.mask, strict=True)]


def _per_channel(vae):
    """Shift and scale (1, C, 1, 1) of a VAE whose config gives its latents' mean and standard deviation."""
    mean, std = (
        torch.tensor(values, dtype=vae.dtype, device=vae.device).view(1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, 1 / std


__all__ = ["FAMILIES", "build_decoder", "family_of"]
