"""
What a VLV does with its frozen text-to-image teacher: the denoising loss, and pictures from caption embeddings.

[`VLVModel`] inherits it. The teacher's modules are the model's `unet` or `transformer`, and `vae`; `teacher` describes
them (see `decoders_vlv.py`).
"""

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.image_processor import VaeImageProcessor

try:
    from .configuration_vlv import VLVConfig
    from .decoders_vlv import Decoder, Prompt
    from .families_vlv import FAMILIES  # noqa: F401  (transformers 5.0 copies what this file names, and no further)
    from .layers_vlv import cast_for, check_images, device_of
except ImportError:
    from configuration_vlv import VLVConfig
    from decoders_vlv import Decoder, Prompt
    from layers_vlv import cast_for, check_images, device_of

if TYPE_CHECKING:  # it imports encoders and image processors that captioning does not need
    from diffusers import DiffusionPipeline


class VLVDiffusionMixin:
    """The part of [`VLVModel`] that its teacher takes part in."""

    config: VLVConfig
    teacher: Decoder | None
    training: bool
    # Parts that the model may lack are None; see `VLVModel.named_parts`.
    vae: Any
    text_encoder: Any
    pooled_projection: Any
    empty_prompt_embeds: Any
    empty_pooled_embeds: Any

    @property
    def denoiser(self) -> torch.nn.Module | None:
        """The teacher's UNet or transformer."""
        return None if self.teacher is None else getattr(self, self.teacher.denoiser)

    # ---- prompts ---------------------------------------------------------------------------------------------

    def empty_context(self, length: int | None = None) -> torch.Tensor:
        """The unconditional context (1, Q, E): that of the empty prompt, cut or padded to `length`."""
        return self.empty_prompt(length).context

    def empty_prompt(self, length: int | None = None, batch_size: int = 1) -> Prompt:
        """The unconditional prompt, as the denoiser reads it: `empty_context` with its mask and pooled vector."""
        length = self.config.num_queries if length is None else length
        mask, pooled = torch.ones(1, length, dtype=torch.bool), None
        if self.text_encoder is None:
            held = self.empty_prompt_embeds[:, :length]
            mask[:, held.shape[1] :] = False
            context = F.pad(held, (0, 0, 0, length - held.shape[1]))
        else:
            context = self.text_encoder(input_ids=self._empty_ids(length))
        if self.pooled_projection is not None:
            pooled = self.empty_pooled_embeds.expand(batch_size, -1)
        return Prompt(context.expand(batch_size, -1, -1), mask.expand(batch_size, -1).to(context.device), pooled).to(
            self.denoiser
        )

    def _empty_ids(self, length):
        if len(self.config.empty_prompt_ids) < length:
            raise ValueError(
                f"config.empty_prompt_ids holds {len(self.config.empty_prompt_ids)} ids, but the context is {length} "
                "long: set it to the empty prompt, padded to the text encoder's positions."
            )
        return torch.tensor([self.config.empty_prompt_ids[:length]], device=device_of(self.text_encoder))

    def _as_prompt(self, context):
        """What the denoiser reads for a context (B, Q, E), all of whose embeddings count."""
        pooled = None
        if self.pooled_projection is not None:
            pooled = self.pooled_projection(cast_for(self.pooled_projection, context.mean(1)))
        mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        return Prompt(context, mask, pooled).to(self.denoiser)

    def encode_latents(self, decoder_pixel_values: torch.Tensor, sample: bool | None = None) -> torch.Tensor:
        """
        `decoder_pixel_values` (B, 3, h, w) in -1..1 -> `latents` (B, C, h/f, w/f), shifted and scaled as the denoiser
        expects them. `sample` draws them from the posterior instead of taking its mean; by default
        `config.sample_latents` decides.
        """
        pixels = self._check_decoder_pixels(decoder_pixel_values)
        return self.teacher.encode_latents(self.vae, pixels, self.config.sample_latents if sample is None else sample)

    def latent_distribution(self, decoder_pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`encode_latents`]: mean and standard deviation of the latents, (B, C, h/f, w/f) each."""
        pixels = self._check_decoder_pixels(decoder_pixel_values)
        return self.teacher.latent_distribution(self.vae, pixels)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """`latents` (B, C, h/f, w/f), as [`encode_latents`] returns them -> images (B, 3, h, w), about -1..1."""
        self._require_decoder("decode latents")
        return self.teacher.decode_latents(self.vae, latents)

    def denoise(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor | Prompt
    ) -> torch.Tensor:
        """
        The teacher's prediction (B, C, h/f, w/f) of noisy latents at integer `timesteps` (B,), 0..T-1 and larger where
        noisier: noise, velocity, or noise minus image, as its family predicts.
        """
        prompt = context if isinstance(context, Prompt) else self._as_prompt(context)
        time = self.teacher.time(timesteps)
        return self.teacher.denoise(self.denoiser, cast_for(self.denoiser, noisy_latents), time, prompt)

    def compute_denoising_loss(
        self,
        latents: torch.Tensor,
        context: torch.Tensor | Prompt,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The stage-1 objective (paper section 3.1): the teacher predicts the noise in the noisy `latents`
        (B, C, h/f, w/f) from `context` (B, Q, E) alone. `noise` (shaped as latents) and `timesteps` (B,) are drawn
        where not given; in training `config.noise_draws` times for each image.
        """
        latents = latents.to(device_of(self.denoiser))
        prompt = context if isinstance(context, Prompt) else self._as_prompt(context)
        draws = self.config.noise_draws
        # Repeating once would change how the latents lie in memory, and so the noise that a seed draws for them.
        if draws > 1 and self.training and noise is None and timesteps is None:
            latents, prompt = latents.repeat_interleave(draws, 0), prompt.repeat(draws)
        if noise is None:
            noise = torch.randn_like(latents)
        if timesteps is None:
            density, shift = self.config.timestep_density, self.config.timestep_shift
            timesteps = self.teacher.draw_timesteps(len(latents), density, shift, latents.device)
        noise, timesteps = noise.to(latents.device), timesteps.to(latents.device)
        if self.training and self.config.context_dropout > 0:
            rows, length = prompt.context.shape[:2]
            dropped = torch.rand(rows, 1, 1, device=prompt.context.device) < self.config.context_dropout
            prompt = prompt.replace(dropped, self.empty_prompt(length))
        prediction = self.denoise(self.teacher.add_noise(latents, noise, timesteps), timesteps, prompt).float()
        target = self.teacher.target(latents, noise, timesteps).to(prediction)
        distance = F.mse_loss if self.config.denoising_loss == "mse" else F.l1_loss
        if self.config.min_snr_gamma is None:
            return distance(prediction, target)
        weights = self.teacher.snr_weights(timesteps, self.config.min_snr_gamma)
        distances = distance(prediction, target, reduction="none").mean(dim=(1, 2, 3))
        return (distances * weights.to(distances.device)).mean()

    @torch.no_grad()
    def reconstruct(
        self,
        pixel_values: torch.Tensor | None = None,
        caption_embeds: torch.Tensor | None = None,
        num_inference_steps: int = 8,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        scheduler: SchedulerMixin | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable | None = None,
        text: str | Sequence[str] | None = None,
        tokenizer=None,
        num_queries: int | None = None,
    ):
        """
        Rebuilds images from their caption embeddings by classifier-free-guided sampling, in diffusers' own pipeline.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): images to rebuild; or
            caption_embeds (`torch.FloatTensor` of shape `(B, Q, E)`): their embeddings, from [`encode`] or composed.
            num_inference_steps (`int`): sampling steps.
            guidance_scale (`float`): 1.0 switches guidance off, which halves the work.
            generator (`torch.Generator` or one per image): makes the result repeatable. With one per image, an image
                does not depend on the others in its batch.
            height, width (`int`, *optional*): pixels; `config.image_size` or the teacher's own size by default.
            scheduler (*optional*): a diffusers scheduler. The default is the teacher's own; with Stable Diffusion 1
                and 2 it is second-order DPM-Solver++ (arXiv 2211.01095), which needs the fewest steps
                (docs/results.md).
            output_type (`str`): `"pil"`, `"np"` or `"pt"`.
            callback_on_step_end: called as `(model, step, timestep, {"latents": latents})` after each step, as in
                diffusers' pipelines. The dictionary that it returns may hold new latents.
            text, tokenizer: words to add to each image, and the tokenizer that reads them (see [`prompt`]).
            num_queries (`int`, *optional*): read only so many of the leading caption embeddings (see [`encode`]).

        Returns:
            A list of B `PIL.Image` (or an array or tensor in 0..1).

        Raises:
            ValueError: the checkpoint has no decoder, not exactly one input is given, or the teacher cannot draw the
                size or take the scheduler.
        """
        self._require_decoder("reconstruct")
        teacher = self.teacher
        size = self.config.image_size or teacher.image_size
        height, width = height or size, width or size
        teacher.check_size(height, width)
        if scheduler is not None:
            teacher.check_scheduler(type(scheduler).__name__, scheduler.config)
        prompt, empty = self._prompts(pixel_values, caption_embeds, guidance_scale > 1, text, tokenizer, num_queries)
        pipeline = self.to_pipeline(scheduler)
        pipeline.set_progress_bar_config(disable=True)
        _run_on(pipeline, prompt.context.device)
        latents = pipeline(
            **teacher.prompt(prompt, empty),
            **teacher.guidance(guidance_scale),
            **_callback(pipeline, callback_on_step_end, self),
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            generator=generator,
            output_type="latent",
        ).images
        images = teacher.finish(self.vae, latents, height, width)
        return VaeImageProcessor().postprocess(images.float(), output_type=output_type)

    @torch.no_grad()
    def prompt(
        self,
        pixel_values: torch.Tensor | None = None,
        caption_embeds: torch.Tensor | None = None,
        guidance: bool = True,
        text: str | Sequence[str] | None = None,
        tokenizer=None,
        num_queries: int | None = None,
    ) -> dict:
        """
        Images as the arguments of the teacher's own pipeline ([`to_pipeline`]): `prompt_embeds`, and what else its
        family reads. Height, width, steps and guidance are the caller's.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): images; or
            caption_embeds (`torch.FloatTensor` of shape `(B, Q, E)`): their embeddings, from [`encode`] or composed.
            guidance (`bool`): also the unconditional prompt, which classifier-free guidance needs.
            text (`str` or one per image, *optional*): words whose embeddings follow the caption embeddings into the
                text encoder (arXiv 2412.06774). Of the caption embeddings the first are kept, as many as there are
                positions left; give fewer to leave the words more say.
            tokenizer (*optional*): the text encoder's, `processor.decoder_tokenizer`; needed for `text`.
            num_queries (`int`, *optional*): read only so many of the leading caption embeddings (see [`encode`]).

        Raises:
            ValueError: the checkpoint has no decoder, or no text encoder for `text`; or `text` is too long.
        """
        self._require_decoder("make prompts")
        return self.teacher.prompt(
            *self._prompts(pixel_values, caption_embeds, guidance, text, tokenizer, num_queries)
        )

    def _prompts(self, pixel_values, caption_embeds, guidance, text, tokenizer, num_queries):
        """The images' prompt, and the unconditional one or `None`."""
        caption_embeds = self._caption_embeds(pixel_values, caption_embeds, num_queries)
        if text is not None:
            words = self._embed_text(text, tokenizer, len(caption_embeds))
            room = self.config.positions - words.shape[1]
            caption_embeds = torch.cat([caption_embeds[:, :room].to(words), words], dim=1)
        context = self.encode_context(caption_embeds)
        empty = self.empty_prompt(context.shape[1], len(context)) if guidance else None
        return self._as_prompt(context), empty

    def embed_words(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """
        Words as caption embeddings (B, T, E): what the decoder's own text encoder makes of `input_ids` (B, T), which
        are its tokenizer's.

        Raises:
            ValueError: the checkpoint keeps no text encoder.
        """
        self._require_text_encoder("words")
        input_ids = input_ids.to(device_of(self.text_encoder))
        if self.config.bypass_text_encoder:  # caption embeddings then enter behind the text encoder, and so must words
            return self.text_encoder(input_ids=input_ids)
        return self.text_encoder.embeddings.token_embedding(input_ids)

    def _embed_text(self, text, tokenizer, count):
        """The embeddings (B, T, E) of words, which are shorter than the text encoder's positions."""
        self._require_text_encoder(f"text={text!r}")
        if tokenizer is None:
            raise ValueError("text needs the text encoder's tokenizer: give tokenizer=processor.decoder_tokenizer.")
        texts = [text] * count if isinstance(text, str) else list(text)
        if len(texts) != count:
            raise ValueError(f"There are {count} images, but {len(texts)} texts: give one for all, or one each.")
        ids = tokenizer(texts, padding="longest", return_tensors="pt").input_ids[:, 1:]  # without the begin of a text
        if ids.shape[1] >= self.config.positions:
            raise ValueError(
                f"text has {ids.shape[1]} tokens, but the text encoder has {self.config.positions} positions, one of "
                "which is for the image: shorten it."
            )
        return self.embed_words(ids)

    def to_pipeline(self, scheduler: SchedulerMixin | None = None, **components) -> "DiffusionPipeline":
        """
        diffusers' own pipeline around this model's denoiser and VAE, which it shares: LoRA, ControlNet and every
        scheduler of diffusers work on it. Call it with [`prompt`]. `components`: others that it should hold, such as
        the teacher's text encoders.
        """
        self._require_decoder("make a pipeline")
        parts = {self.teacher.denoiser: self.denoiser, "vae": self.vae}
        return self.teacher.make_pipeline(scheduler, **parts | components)

    def _check_decoder_pixels(self, decoder_pixel_values):
        self._require_decoder("encode latents")
        source = "in -1..1: use processor(..., return_decoder_pixel_values=True)"
        check_images("decoder_pixel_values", decoder_pixel_values, source)
        # `not <=` also finds NaN
        if not torch.compiler.is_compiling() and not decoder_pixel_values.abs().amax() <= 1.01:
            raise ValueError(f"decoder_pixel_values are not {source}.")
        return cast_for(self.vae, decoder_pixel_values)

    def _require_text_encoder(self, what):
        self._require_decoder(f"read {what}")
        if self.text_encoder is None:
            raise ValueError(
                f"This checkpoint keeps no text encoder and cannot read {what}: its teacher, "
                f"{self.teacher.pipeline}, reads caption embeddings alone."
            )

    def _require_decoder(self, purpose):
        if self.teacher is None:
            raise ValueError(
                f"This model has no diffusion decoder and cannot {purpose}: load a checkpoint that has one with "
                "AutoModel (AutoModelForImageTextToText leaves it out)."
            )


def _run_on(pipeline, device):
    """Makes a pipeline compute on a device that its parts do not tell, as where they are offloaded."""
    kind = type(pipeline)
    pipeline.__class__ = type(kind.__name__, (kind,), {"_execution_device": property(lambda self: device)})


def _callback(pipeline, callback, model):
    """The arguments of a pipeline's call that make it call `callback(model, step, timestep, tensors)`."""
    if callback is None:
        return {}
    if "callback_on_step_end" in inspect.signature(type(pipeline).__call__).parameters:
        return {"callback_on_step_end": lambda pipeline, *step: callback(model, *step)}
    # An older pipeline, which shows its latents but takes no others.
    return {"callback": lambda step, time, latents: callback(model, step, time, {"latents": latents})}


__all__ = ["VLVDiffusionMixin"]
