"""VLV (Vision-Language-Vision) auto-encoder, arXiv 2507.07104.

The data flow, with Q queries, D the encoder's width, E the text encoder's, L the caption head's:

    pixel_values (B, 3, H, W) ─ Florence-2, asked by the queries ─► (B, Q, D) ─ projection ─► caption_embeds (B, Q, E)
    caption_embeds ─ CLIP text encoder, entered at its embedding layer ─► context (B, Q, E)
    context ─ frozen UNet and VAE ─► the image again               (stage 1 trains this: the denoising loss)
    context ─ prefix_projection ─► (B, Q, L) ─ LLM ─► the caption  (stage 2 trains this: the caption loss)
"""

import copy
import functools
import inspect
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.training_utils import compute_snr
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPTextModel,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Model,
    Florence2VisionConfig,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.utils import ModelOutput, cached_file
from transformers.utils.generic import is_flash_attention_requested

try:
    from .configuration_vlv import VLVConfig
    from .pipeline_vlv import VLVImageToTextPipeline  # noqa: F401  (a saved repo brings all of its code along)
    from .processing_vlv import VLVProcessor  # noqa: F401
except ImportError:
    from configuration_vlv import VLVConfig

CODE_FILES = ("configuration_vlv.py", "modeling_vlv.py", "processing_vlv.py", "images_vlv.py", "pipeline_vlv.py")
HUB_KWARGS = ("revision", "token", "local_files_only", "cache_dir", "force_download", "proxies")  # where from, and how
# What Florence-2's processor makes of <MORE_DETAILED_CAPTION>, which is what the paper asks it.
TASK_PROMPT = "Describe with a paragraph what is shown in the image."

# Room for a detailed caption, as in the paper; a trained model ends it by itself.
MAX_NEW_TOKENS = 300

# What each stage trains unless told otherwise (paper section 3; REFERENCE table in docs/training.md).
STAGES = {
    "autoencode": ("queries", "projection", "language_model"),
    "caption": ("prefix_projection", "caption_head"),
    "frozen": (),
}


@dataclass
class VLVOutput(ModelOutput):
    """
    Output of [`VLVModel`]; what was not asked for is `None`.

    Args:
        loss (`torch.FloatTensor` of shape `()`): the sum of the losses below.
        denoising_loss (`torch.FloatTensor` of shape `()`): stage 1, MSE or L1 in latent units.
        caption_loss (`torch.FloatTensor` of shape `()`): stage 2, nats per caption token, the end-of-text included.
        logits (`torch.FloatTensor` of shape `(B, T + 1, vocabulary)`): `logits[:, i]` predicts `input_ids[:, i]`, and
            the last one the token after them.
        caption_embeds (`torch.FloatTensor` of shape `(B, Q, E)`): the bottleneck.
        context (`torch.FloatTensor` of shape `(B, Q, E)`): the text encoder's reading of it.
        hidden_states, attentions (tuples of `torch.FloatTensor`): the caption head's, of prefix and caption.
    """

    loss: torch.FloatTensor | None = None
    denoising_loss: torch.FloatTensor | None = None
    caption_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    caption_embeds: torch.FloatTensor | None = None
    context: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class VLVProjection(torch.nn.Sequential):
    """Linear, GELU, Linear: from one part's width to the next one's."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(
            torch.nn.Linear(in_features, out_features), torch.nn.GELU(), torch.nn.Linear(out_features, out_features)
        )


class VLVTextEncoder(torch.nn.Module):
    """
    CLIP's text encoder, which also takes embeddings in place of token ids.

    Its parts are held directly, because the prefix that `CLIPTextModel` gives their weights differs between
    releases of transformers 5 and a checkpoint must load in all of them.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        clip = CLIPTextModel(config)
        clip = getattr(clip, "text_model", clip)
        self.embeddings, self.encoder, self.final_layer_norm = clip.embeddings, clip.encoder, clip.final_layer_norm
        del self.embeddings.position_ids  # not part of a checkpoint: forward() makes its own

    def forward(self, input_ids=None, inputs_embeds=None):
        """`input_ids` (B, Q) or `inputs_embeds` (B, Q, E), to which positions are added here -> context (B, Q, E)."""
        inputs = inputs_embeds if input_ids is None else input_ids
        length = inputs.shape[1]
        position_ids = torch.arange(length, device=inputs.device)[None]
        hidden_states = self.embeddings(input_ids, position_ids, inputs_embeds)
        mask, attention = None, self.config._attn_implementation
        if attention == "flex_attention":
            mask = create_block_mask(
                lambda b, h, query, key: query >= key, None, None, length, length, hidden_states.device
            )
        elif attention != "sdpa" and not is_flash_attention_requested(self.config):  # those two read is_causal
            mask = torch.full((length, length), torch.finfo(hidden_states.dtype).min, device=hidden_states.device)
            mask = mask.to(hidden_states.dtype).triu(1)[None, None]
        hidden_states = self.encoder(inputs_embeds=hidden_states, attention_mask=mask, is_causal=True)[0]
        return self.final_layer_norm(hidden_states)


class VLVPreTrainedModel(PreTrainedModel):
    config_class = VLVConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D", "VLVTextEncoder"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, VLVModel):
            init.normal_(module.queries, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As `PreTrainedModel.from_pretrained`; UNet, VAE and text encoder come back frozen (loading thaws them)."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_decoder()
        return loaded

    def save_pretrained(self, save_directory, is_main_process=True, **kwargs):
        """As `PreTrainedModel.save_pretrained`, and the repo's code with it, so that the folder is complete."""
        for adapter in getattr(self, "peft_config", {}).values():
            if Path(
                adapter.base_model_name_or_path or ""
            ).exists():  # a folder of this machine means nothing elsewhere
                adapter.base_model_name_or_path = None
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        for name in CODE_FILES:
            # Code loaded from the Hub lies in a module cache that may lack the files nobody has imported yet.
            source = Path(__file__).parent / name
            if not source.is_file():
                source = Path(cached_file(self.config._name_or_path, name))
            target = Path(save_directory) / name
            if not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)


class VLVModel(VLVPreTrainedModel, GenerationMixin):
    """
    The whole auto-encoder: Florence-2 encoder, frozen diffusion decoder, and the LLM that writes captions.

    `config.decoder_config=None` or `config.caption_config=None` leave that part out; [`VLVForConditionalGeneration`]
    always leaves the decoder out.

    Example:

    ```python
    >>> import vlv
    >>> from transformers import AutoModel, AutoProcessor

    >>> repo = vlv.tiny_checkpoint()
    >>> model = AutoModel.from_pretrained(repo, trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    >>> inputs = processor(images="scene.png")
    >>> processor.batch_decode(model.generate(**inputs))
    >>> model.reconstruct(**inputs)[0].save("rebuilt.png")
    ```
    """

    def __init__(self, config: VLVConfig):
        super().__init__(config)
        encoder_width = config.encoder_config.text_config.d_model
        context_width = config.text_encoder_config.hidden_size
        self.encoder = Florence2Model(config.encoder_config)
        self.queries = torch.nn.Parameter(torch.empty(config.num_queries, encoder_width))
        self.projection = VLVProjection(encoder_width, context_width)
        self.text_encoder = VLVTextEncoder(config.text_encoder_config)
        self.unet = self.vae = self.noise_scheduler = None
        if config.decoder_config is not None:
            self.unet = UNet2DConditionModel.from_config(config.decoder_config["unet"])
            self.vae = AutoencoderKL.from_config(config.decoder_config["vae"])
            with torch.device("cpu"):  # its tables are no weights: never on the meta device
                self.noise_scheduler = DDPMScheduler.from_config(config.decoder_config["scheduler"])
        self.prefix_projection = self.caption_head = None
        if config.caption_config is not None:
            self.prefix_projection = VLVProjection(context_width, config.caption_config.hidden_size)
            self.caption_head = AutoModelForCausalLM.from_config(config.caption_config)
        # A checkpoint may hold parts that this model was asked not to have: they are skipped, not warned about.
        absent = [name for name, part in self.named_parts() if part is None]
        self._keys_to_ignore_on_load_unexpected = [rf"^{name}\." for name in absent]
        self.post_init()
        # FSDP refuses a layer's name that the model lacks: without a decoder there are none of the UNet's.
        self._no_split_modules = {type(module).__name__ for module in self.modules()} & set(self._no_split_modules)
        self.freeze_decoder()

    # ---- parts: what trains and what is frozen -------------------------------------------------------------

    def named_parts(self) -> Iterable[tuple[str, torch.nn.Module | torch.nn.Parameter | None]]:
        """The parts that [`set_stage`] can train, by name; together they are all of the model's weights."""
        language_model = self.encoder.language_model
        return (
            ("vision_tower", self.encoder.vision_tower),
            ("image_projection", self.encoder.multi_modal_projector),
            ("word_embeddings", language_model.shared),
            ("language_model", torch.nn.ModuleList([language_model.encoder, language_model.decoder])),
            ("queries", self.queries),
            ("projection", self.projection),
            ("text_encoder", self.text_encoder),
            ("unet", self.unet),
            ("vae", self.vae),
            ("prefix_projection", self.prefix_projection),
            ("caption_head", self.caption_head),
        )

    def set_stage(self, stage: str, train: Sequence[str] | None = None) -> "VLVModel":
        """
        Sets what trains: the one owner of `requires_grad`, and of eval mode for whatever is frozen.

        Args:
            stage (`str`): `"autoencode"` (stage 1), `"caption"` (stage 2) or `"frozen"`.
            train (sequence of `str`, *optional*): part names (see `named_parts`) in place of the stage's own.

        Raises:
            ValueError: for an unknown stage or part, or a part that this checkpoint does not have.
        """
        if stage not in STAGES:
            raise ValueError(f"Unknown stage {stage!r}: choose {', '.join(STAGES)}.")
        train = STAGES[stage] if train is None else tuple(train)
        parts = dict(self.named_parts())
        for name in train:
            if name not in parts:
                raise ValueError(f"There is no part {name!r} to train: choose among {', '.join(parts)}.")
            if parts[name] is None:
                raise ValueError(f"Stage {stage!r} trains {name}, which this checkpoint does not have.")
        needed = {"autoencode": "unet", "caption": "caption_head"}.get(stage)
        if needed and parts[needed] is None:
            raise ValueError(f"Stage {stage!r} needs the part {needed}, which this checkpoint does not have.")
        self.requires_grad_(False)
        for name in train:
            parts[name].requires_grad_(True)
        if "word_embeddings" not in train:  # the language model's own table, tied into both of its halves
            self.encoder.language_model.shared.requires_grad_(False)
        return self.train(self.training)

    def freeze_decoder(self) -> None:
        """Freezes text encoder, UNet and VAE, which never train in either stage."""
        for part in (self.text_encoder, self.unet, self.vae):
            if part is not None:
                part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "VLVModel":
        """As `Module.train`, but a part with nothing to train stays in eval mode: no dropout in the teacher."""
        super().train(mode)
        shared = self.encoder.language_model.shared.weight  # tied into the language model: alone, it wakes no dropout
        for _, part in self.named_parts():
            if isinstance(part, torch.nn.Module) and not any(
                parameter.requires_grad and parameter is not shared for parameter in part.parameters()
            ):
                part.eval()
        return self

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict | None = None,
        parts: Sequence[str] = ("encoder", "unet", "caption_head"),
        **kwargs,
    ) -> None:
        """Trades a second forward pass for activation memory, part by part: encoder, unet, caption_head."""
        for name in parts:
            part = getattr(self, name)
            if name == "unet" and part is not None:
                part.enable_gradient_checkpointing()
            elif part is not None:  # recent releases renamed it, and pass more to it
                enable = getattr(part, "activation_checkpointing_enable", part.gradient_checkpointing_enable)
                enable(gradient_checkpointing_kwargs or {"use_reentrant": False}, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Switches gradient checkpointing off in every part."""
        if self.unet is not None:
            self.unet.disable_gradient_checkpointing()
        for part in (self.encoder, self.caption_head):
            if part is not None:
                getattr(part, "activation_checkpointing_disable", part.gradient_checkpointing_disable)()

    @property
    def _text_part(self):
        """The part that owns the token embeddings: the caption head, or Florence-2 where there is none."""
        return self.encoder if self.caption_head is None else self.caption_head

    def get_input_embeddings(self):
        return self._text_part.get_input_embeddings()

    def set_input_embeddings(self, value):
        self._text_part.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self._text_part.get_output_embeddings()

    def set_output_embeddings(self, value):
        self._text_part.set_output_embeddings(value)

    # ---- image -> caption embeddings -> context ------------------------------------------------------------

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values` (B, 3, H, W), normalised by the processor -> image tokens (B, T, D)."""
        self._check_pixel_values(pixel_values)
        features = self.encoder.vision_tower(_cast(pixel_values, self.encoder.vision_tower)).last_hidden_state
        return self.encoder.multi_modal_projector(features)

    def encode(
        self, pixel_values: torch.Tensor | None = None, image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Writes an image down as caption embeddings (paper section 3.1).

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): images from the processor, of any float dtype.
            image_features (`torch.FloatTensor` of shape `(B, T, D)`): [`get_image_features`] of them, if at hand.

        Returns:
            `torch.FloatTensor` of shape `(B, Q, E)`: the caption embeddings.
        """
        if image_features is None:
            image_features = self.get_image_features(pixel_values)
        language_model = self.encoder.language_model
        batch_size = image_features.shape[0]
        prompt = torch.tensor(self.config.prompt_ids, dtype=torch.long, device=_device(language_model))
        prompt = language_model.encoder.embed_tokens(prompt).expand(batch_size, -1, -1)
        tokens = torch.cat([image_features.to(prompt), prompt], dim=1)  # (B, T + P, D)
        memory = language_model.encoder(inputs_embeds=tokens).last_hidden_state
        if self.queries.is_meta and hasattr(
            self, "_hf_hook"
        ):  # the whole model is offloaded, and this is not forward()
            self._hf_hook.pre_forward(self)
        queries = self.queries.to(prompt).expand(batch_size, -1, -1)
        answers = language_model.decoder(
            inputs_embeds=queries, encoder_hidden_states=memory, use_cache=False
        ).last_hidden_state  # (B, Q, D)
        return self.projection(_cast(answers, self.projection))

    def encode_context(self, caption_embeds: torch.Tensor) -> torch.Tensor:
        """`caption_embeds` (B, Q, E) -> `context` (B, Q, E), what the UNet and the caption head read."""
        width, positions = (
            self.config.text_encoder_config.hidden_size,
            self.config.text_encoder_config.max_position_embeddings,
        )
        if caption_embeds.ndim != 3 or caption_embeds.shape[-1] != width or caption_embeds.shape[1] > positions:
            raise ValueError(
                f"caption_embeds have shape {tuple(caption_embeds.shape)}: expected (batch, queries, {width}) with at "
                f"most {positions} queries, as encode() returns them."
            )
        caption_embeds = _cast(caption_embeds, self.text_encoder)
        return caption_embeds if self.config.bypass_text_encoder else self.text_encoder(inputs_embeds=caption_embeds)

    def empty_context(self, length: int | None = None) -> torch.Tensor:
        """The unconditional context (1, Q, E): the empty prompt through the text encoder, at the queries' length."""
        length = self.config.num_queries if length is None else length
        if len(self.config.empty_prompt_ids) < length:
            raise ValueError(
                f"config.empty_prompt_ids holds {len(self.config.empty_prompt_ids)} ids, but the context is {length} "
                "long: set it to the empty prompt, padded to the text encoder's positions."
            )
        ids = torch.tensor([self.config.empty_prompt_ids[:length]], device=_device(self.text_encoder))
        return self.text_encoder(input_ids=ids)

    # ---- the frozen decoder: context -> image --------------------------------------------------------------

    def encode_latents(self, decoder_pixel_values: torch.Tensor, sample: bool | None = None) -> torch.Tensor:
        """
        `decoder_pixel_values` (B, 3, h, w) in -1..1 -> `latents` (B, C, h/f, w/f), shifted and scaled as the UNet
        expects them. `sample`: from the posterior, or its mean; `config.sample_latents` by default.
        """
        self._require_decoder("encode latents")
        source = "in -1..1: use processor(..., return_decoder_pixel_values=True)"
        _check_images("decoder_pixel_values", decoder_pixel_values, source)
        if not torch.compiler.is_compiling() and not decoder_pixel_values.abs().amax() <= 1.01:  # nor is NaN
            raise ValueError(f"decoder_pixel_values are not {source}.")
        posterior = self.vae.encode(_cast(decoder_pixel_values, self.vae)).latent_dist
        sample = self.config.sample_latents if sample is None else sample
        latents = posterior.sample() if sample else posterior.mean
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """`latents` (B, C, h/f, w/f), as [`encode_latents`] gives them -> images (B, 3, h, w), about -1..1."""
        self._require_decoder("decode latents")
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return self.vae.decode(_cast(latents, self.vae)).sample

    def denoise(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The UNet's prediction (B, C, h/f, w/f): noise or velocity, as the scheduler's config says."""
        return self.unet(
            _cast(noisy_latents, self.unet), timesteps, encoder_hidden_states=_cast(context, self.unet)
        ).sample

    def compute_denoising_loss(
        self,
        latents: torch.Tensor,
        context: torch.Tensor,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The stage-1 objective (paper section 3.1): the UNet must tell, from `context` (B, Q, E) alone, what was done to
        `latents` (B, C, h/f, w/f). `noise` (as latents) and `timesteps` (B,) are drawn where not given.
        """
        scheduler = self.noise_scheduler
        latents = latents.to(_device(self.unet))
        if noise is None:
            noise = torch.randn_like(latents)
        if timesteps is None:
            timesteps = torch.randint(scheduler.config.num_train_timesteps, latents.shape[:1], device=latents.device)
        noise, timesteps = noise.to(latents.device), timesteps.to(latents.device)
        if self.training and self.config.context_dropout > 0:
            dropped = torch.rand(context.shape[0], 1, 1, device=context.device) < self.config.context_dropout
            context = torch.where(dropped, self.empty_context(context.shape[1]).to(context), context)
        prediction = self.denoise(scheduler.add_noise(latents, noise, timesteps), timesteps, context).float()
        is_velocity = scheduler.config.prediction_type == "v_prediction"
        target = (scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise).to(prediction)
        distance = F.mse_loss if self.config.denoising_loss == "mse" else F.l1_loss
        if self.config.min_snr_gamma is None:
            return distance(prediction, target)
        snr = compute_snr(scheduler, timesteps)
        weights = snr.clamp(max=self.config.min_snr_gamma) / (snr + 1 if is_velocity else snr.clamp(min=1e-8))
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
    ):
        """
        Rebuilds images from their caption embeddings by classifier-free-guided sampling.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): images to rebuild; or
            caption_embeds (`torch.FloatTensor` of shape `(B, Q, E)`): their embeddings, from [`encode`] or composed.
            num_inference_steps (`int`): sampling steps.
            guidance_scale (`float`): 1.0 switches guidance off, and with it half of the work.
            generator (`torch.Generator` or one per image): makes the result repeatable; one per image makes it
                independent of the batch it is drawn in.
            height, width (`int`, *optional*): pixels; `config.image_size` or the UNet's own size by default.
            scheduler (*optional*): a diffusers scheduler; by default DPM-Solver++ of second order (arXiv 2211.01095),
                on the checkpoint's own noise schedule, which needs the fewest steps (docs/results.md).
            output_type (`str`): `"pil"`, `"np"` or `"pt"`.
            callback_on_step_end: called as `(model, step, timestep, {"latents": latents})` after each step, as in
                diffusers' pipelines; the dictionary that it returns may hold new latents.

        Returns:
            A list of B `PIL.Image` (or an array or tensor in 0..1).

        Raises:
            ValueError: when the checkpoint has no decoder, or when not exactly one input is given.
        """
        self._require_decoder("reconstruct")
        context = self._context(pixel_values, caption_embeds)
        if scheduler is None:
            scheduler = DPMSolverMultistepScheduler.from_config(self.config.decoder_config["scheduler"])
        scheduler.set_timesteps(num_inference_steps, device=context.device)
        step_accepts = inspect.signature(scheduler.step).parameters
        step_arguments = {"generator": generator} if "generator" in step_accepts else {}
        context = _cast(context, self.unet)
        batch_size = context.shape[0]
        guided = guidance_scale > 1
        if guided:
            empty = _cast(self.empty_context(context.shape[1]), self.unet)
            context = torch.cat([empty.expand_as(context), context])
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        size = self.config.image_size or self.unet.config.sample_size * factor
        shape = (batch_size, self.unet.config.in_channels, (height or size) // factor, (width or size) // factor)
        latents = randn_tensor(shape, generator=generator, device=context.device, dtype=context.dtype)
        latents = latents * scheduler.init_noise_sigma
        for step, timestep in enumerate(scheduler.timesteps):
            noisy = torch.cat([latents, latents]) if guided else latents
            prediction = self.denoise(scheduler.scale_model_input(noisy, timestep), timestep, context)
            if guided:
                without, with_context = prediction.chunk(2)
                prediction = without + guidance_scale * (with_context - without)
            latents = scheduler.step(prediction, timestep, latents, **step_arguments).prev_sample
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, step, timestep, {"latents": latents}).get("latents", latents)
        images = self.decode_latents(latents)
        return VaeImageProcessor().postprocess(images.float(), output_type=output_type)

    # ---- the caption head: context -> text -----------------------------------------------------------------

    def _caption_inputs(self, context, input_ids=None, attention_mask=None):
        """The prefix and then the caption's tokens: embeddings (B, Q + T, L) and their attention mask (B, Q + T)."""
        prefix = self.prefix_projection(_cast(context, self.prefix_projection))
        embeddings = self.caption_head.get_input_embeddings()
        prefix = prefix.to(embeddings.weight.dtype)
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        if input_ids is None or input_ids.shape[1] == 0:
            return prefix, mask
        _check_batch(context, input_ids=input_ids, attention_mask=attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeds = torch.cat([prefix, embeddings(input_ids.to(_device(embeddings))).to(prefix.device)], dim=1)
        return embeds, torch.cat([mask, attention_mask.to(mask)], dim=1)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        caption_embeds: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ):
        """
        Writes captions: `GenerationMixin.generate` of the caption head behind the images' prefix, with all of its
        arguments (beams, sampling, streamers, logits processors, `max_new_tokens`, ...).

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): images to caption; or
            caption_embeds (`torch.FloatTensor` of shape `(B, Q, E)`): their embeddings, from [`encode`] or composed.
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): the beginning of each caption, which is
                continued; padded on either side, with its `attention_mask`.

        Returns:
            `torch.LongTensor` of shape `(B, new tokens)`: only what was written, without `input_ids`.

        Raises:
            ValueError: when the checkpoint has no caption head, or when not exactly one input is given.
        """
        self._require_caption_head("caption")
        context = self._context(pixel_values, caption_embeds)
        inputs_embeds, attention_mask = self._caption_inputs(context, input_ids, attention_mask)
        # Padding goes to the left of the prefix too: generation counts positions from where the padding ends.
        order = attention_mask.argsort(dim=1, stable=True)
        inputs_embeds = inputs_embeds.take_along_dim(order[..., None], dim=1)
        attention_mask = attention_mask.take_along_dim(order, dim=1)
        generation_config = copy.deepcopy(generation_config or GenerationConfig())
        # What it leaves open is the checkpoint's, as in every model of the library.
        defaults = self.generation_config.to_dict()
        generation_config.update(**defaults, defaults_only=True, allow_custom_entries=True)
        kwargs = generation_config.update(**kwargs)  # what is no generation setting: streamer, logits_processor, ...
        return self.caption_head.generate(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, generation_config=generation_config, **kwargs
        )

    # ---- training ------------------------------------------------------------------------------------------

    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        decoder_pixel_values: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        caption_embeds: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> VLVOutput:
        """
        What is given decides what is computed: `decoder_pixel_values` or `latents` the denoising loss (stage 1),
        `input_ids` the logits, `labels` the caption loss (stage 2), and always the context.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): images from the processor. In its place:
            image_features (`torch.FloatTensor` of shape `(B, T, D)`): cached image tokens ([`get_image_features`]), or
            caption_embeds (`torch.FloatTensor` of shape `(B, Q, E)`): cached caption embeddings ([`encode`]).
            decoder_pixel_values (`torch.FloatTensor` of shape `(B, 3, h, w)`): the same images, -1..1. In its place:
            latents (`torch.FloatTensor` of shape `(B, C, h/f, w/f)`): cached latents ([`encode_latents`]).
            noise, timesteps: as latents, and `(B,)`: fixed in place of drawn ones, for comparable evaluations.
            input_ids, attention_mask (`torch.LongTensor` of shape `(B, T)`): the captions, padded on the right.
            labels (`torch.LongTensor` of shape `(B, T)`): the captions again, -100 where nothing is to be learnt. They
                are the captions themselves where `input_ids` are not given.
            num_items_in_batch: the label count to divide by, which Trainer gives under gradient accumulation.
            output_hidden_states, output_attentions (`bool`, *optional*): also return the caption head's.

        Returns:
            [`VLVOutput`].
        """
        if caption_embeds is None:
            caption_embeds = self.encode(pixel_values, image_features)
        context = self.encode_context(caption_embeds)
        denoising_loss = caption_loss = None
        written = {}  # by the caption head
        _check_batch(
            context,
            decoder_pixel_values=decoder_pixel_values,
            latents=latents,
            noise=noise,
            timesteps=timesteps,
            labels=labels,
        )
        if latents is None and decoder_pixel_values is not None:
            with torch.no_grad():
                latents = self.encode_latents(decoder_pixel_values)
        if latents is not None:
            self._require_decoder("compute the denoising loss")
            denoising_loss = self.compute_denoising_loss(latents, context, noise, timesteps)
        if input_ids is None and labels is not None:
            input_ids = labels.masked_fill(labels == -100, 0)
            attention_mask = labels != -100 if attention_mask is None else attention_mask
        if input_ids is not None:
            self._require_caption_head("read captions")
            inputs_embeds, attention_mask = self._caption_inputs(context, input_ids, attention_mask)
            asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
            # The prefix is not projected to the vocabulary: only its last position, which predicts the first token.
            kept = input_ids.shape[1] + 1
            if not isinstance(
                kept, int
            ):  # torch.export's symbol for it, which the caption head would take for an index
                kept = torch.arange(-kept, 0, device=context.device)
            written = self.caption_head(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                use_cache=False,
                logits_to_keep=kept,
                **{
                    name: getattr(self.config, name) or None if value is None else value
                    for name, value in asked.items()
                },
            )
            if labels is not None:
                caption_loss = self.caption_head.loss_function(
                    logits=written.logits,
                    labels=F.pad(labels, (1, 0), value=-100),  # the prefix's last position has no label of its own
                    vocab_size=written.logits.shape[-1],
                    num_items_in_batch=num_items_in_batch,
                )
        losses = [loss for loss in (denoising_loss, caption_loss) if loss is not None]
        # Built at the end: in transformers 5.0, what is set on an output later is missing from its keys.
        output = VLVOutput(
            loss=sum(loss.to(context.device) for loss in losses) if losses else None,
            denoising_loss=denoising_loss,
            caption_loss=caption_loss,
            caption_embeds=caption_embeds,
            context=context,
            **{name: written.get(name) for name in ("logits", "hidden_states", "attentions")},
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    # ---- assembling ----------------------------------------------------------------------------------------

    @classmethod
    def from_components(
        cls,
        encoder: str,
        decoder: str,
        caption_head: str | None = None,
        *,
        num_queries: int | None = None,
        image_size: int | None = None,
        prompt: str = TASK_PROMPT,
        dtype: torch.dtype | str | None = None,
        **kwargs,
    ) -> "VLVModel":
        """
        A VLV from pretrained parts, with new queries and projections.

        Args:
            encoder (`str`): id or folder of a Florence-2, in transformers' own or in Microsoft's remote-code layout.
            decoder (`str`): id or folder of a Stable Diffusion 1.x or 2.x in diffusers' layout.
            caption_head (`str`, *optional*): id or folder of a decoder-only language model.
            num_queries (`int`, *optional*): the text encoder's positions (77 for CLIP's) by default.
            image_size (`int`, *optional*): pixels of a reconstruction's side; the UNet's own by default.
            prompt (`str`): the task prompt, in words.
            dtype (`torch.dtype`, *optional*): of all weights; by default the narrowest in which no part loses a digit.
            kwargs: `revision`, `token`, `local_files_only`, `cache_dir` for reading each part; the rest
                (`device_map`, `quantization_config`, `attn_implementation`, ...) as `from_pretrained` takes them.

        Raises:
            OSError: when a part cannot be found or read.
            ValueError: when a part is of another kind, or the parts do not fit; the sentence names both sizes.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        loading = {"dtype": dtype or "auto", **hub_kwargs}
        llm = None
        with reading_part("encoder", encoder):
            florence = load_florence(encoder, **loading)
            prompt_ids = tokenize_prompt(encoder, prompt, **hub_kwargs)
        with reading_part("decoder", decoder):
            clip = load_part(CLIPTextModel, decoder, subfolder="text_encoder", **loading)
            unet = load_part(UNet2DConditionModel, decoder, subfolder="unet", torch_dtype=dtype, **hub_kwargs)
            vae = load_part(AutoencoderKL, decoder, subfolder="vae", torch_dtype=dtype, **hub_kwargs)
            scheduler_config = DDPMScheduler.load_config(decoder, subfolder="scheduler", **hub_kwargs)
            positions = clip.config.max_position_embeddings
            empty_prompt_ids = tokenize_empty_prompt(decoder, positions, **hub_kwargs)
        if caption_head is not None:
            with reading_part("caption head", caption_head):
                llm = load_part(AutoModelForCausalLM, caption_head, **loading)
        parts = {
            "encoder": module_weights(florence),
            "text_encoder": module_weights(getattr(clip, "text_model", clip)),
            "unet": module_weights(unet),
            "vae": module_weights(vae),
            "caption_head": {} if llm is None else module_weights(llm),
        }
        weights = {f"{name}.{key}": weight for name, part in parts.items() for key, weight in part.items()}
        config = VLVConfig(
            encoder_config=florence.config,
            text_encoder_config=clip.config,
            decoder_config={"unet": unet.config, "vae": vae.config, "scheduler": scheduler_config},
            caption_config=None if llm is None else llm.config,
            num_queries=positions if num_queries is None else num_queries,
            image_size=image_size,
            prompt_ids=prompt_ids,
            empty_prompt_ids=empty_prompt_ids,
        )
        record_origins(config, encoder, decoder, caption_head)
        dtype = dtype or functools.reduce(torch.promote_types, {weight.dtype for weight in weights.values()})
        # The library's own loading places the weights, ties what each part ties, and makes new what no part has.
        model = cls.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, **kwargs)
        if llm is not None:
            model.generation_config = llm.generation_config
            if model.generation_config.max_new_tokens is None:  # the library would stop after 20 tokens
                model.generation_config.max_new_tokens = MAX_NEW_TOKENS
        return model

    # ---- checks --------------------------------------------------------------------------------------------

    def _context(self, pixel_values, caption_embeds):
        if (pixel_values is None) == (caption_embeds is None):
            raise ValueError("Give either pixel_values or caption_embeds.")
        return self.encode_context(self.encode(pixel_values) if caption_embeds is None else caption_embeds)

    def _check_pixel_values(self, pixel_values):
        if pixel_values is None:
            raise ValueError("Nothing to encode: give pixel_values, image_features or caption_embeds.")
        _check_images("pixel_values", pixel_values, "from the processor")
        if not torch.compiler.is_compiling() and not pixel_values.abs().amax() <= 20:  # nor is NaN
            raise ValueError(
                "pixel_values are not normalised (values beyond 20) or not finite: take them from the processor."
            )
        vision = self.config.encoder_config.vision_config
        stride = 1
        for step in vision.patch_stride:
            stride *= step
        if max(pixel_values.shape[2:]) > stride * vision.max_position_embeddings:
            raise ValueError(
                f"pixel_values are {pixel_values.shape[2]}x{pixel_values.shape[3]} pixels, but the encoder "
                f"has positions for {stride * vision.max_position_embeddings}: resize the images with the processor."
            )

    def _require_decoder(self, purpose):
        if self.unet is None:
            raise ValueError(
                f"This model has no diffusion decoder and cannot {purpose}: load a checkpoint that has one with "
                "AutoModel (AutoModelForImageTextToText leaves it out)."
            )

    def _require_caption_head(self, purpose):
        if self.caption_head is None:
            raise ValueError(
                f"This checkpoint has no caption head and cannot {purpose}: train one (stage 2), or load another."
            )


# GenerationMixin is named again: where it is not a direct base, AutoModelForImageTextToText makes a new class of a
# repo's, which cannot be pickled.
class VLVForConditionalGeneration(VLVModel, GenerationMixin):
    """The captioner alone: a [`VLVModel`] that never builds or reads UNet and VAE, whatever the checkpoint holds."""

    def __init__(self, config: VLVConfig):
        config = copy.copy(config)  # the caller's keeps its decoder
        config.decoder_config = None
        super().__init__(config)
        self.loss_type = None  # from the class name, Trainer would think that labels are shifted, and miscount them


def _check_images(name, images, source):
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"{name} are a {type(images).__name__}: expected a tensor {source}.")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
        raise ValueError(
            f"{name} are {tuple(images.shape)} {images.dtype}: expected floats of shape (batch, 3, height, width) "
            f"{source}."
        )


def _check_batch(context, **inputs):
    for name, tensor in inputs.items():
        if tensor is not None and tensor.shape[0] != context.shape[0]:
            raise ValueError(
                f"There are {len(context)} images, but {len(tensor)} rows of {name}: each image needs its own."
            )


def _device(module: torch.nn.Module) -> torch.device | None:
    """The device of the module that reads an input; `None` of an offloaded one, whose hooks move its inputs."""
    weight = next(module.parameters())
    return None if weight.is_meta else weight.device


def _cast(tensor: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """The tensor on the device and in the dtype of the module that reads it."""
    return tensor.to(_device(module), next(module.parameters()).dtype)


# ---- reading the parts -------------------------------------------------------------------------------------

# What Microsoft's remote code calls the weights of a Florence-2, and what transformers' own Florence2Model calls them.
MICROSOFT_FLORENCE_KEYS = (
    (r"^image_projection$", "multi_modal_projector.image_projection.weight"),  # and transposed
    (r"^image_pos_embed\.", "multi_modal_projector.image_position_embed."),
    (r"^(image_proj_norm|visual_temporal_embed)\.", r"multi_modal_projector.\1."),
    (r"^(vision_tower\.convs\.\d+)\.proj\.", r"\1.conv."),
    (r"^(vision_tower\..+\.conv[12])\.fn\.dw\.", r"\1."),
    (r"^(vision_tower\..+)\.(?:window|channel)_attn\.norm\.", r"\1.norm1."),
    (r"^(vision_tower\..+\.(?:window|channel)_attn)\.fn\.", r"\1."),
    (r"^(vision_tower\..+)\.ffn\.norm\.", r"\1.norm2."),
    (r"^(vision_tower\..+\.ffn)\.fn\.net\.", r"\1."),
    (r"^language_model\.model\.", "language_model."),
)
# The tied copies of the word embeddings, the first of which is the one that is kept.
FLORENCE_EMBEDDINGS = tuple(
    f"language_model.{name}.weight" for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
)


def rename_florence_key(key: str) -> str:
    """The name in transformers' `Florence2Model` of a weight that Microsoft's remote code calls `key`."""
    for pattern, replacement in MICROSOFT_FLORENCE_KEYS:
        key = re.sub(pattern, replacement, key)
    return key


def load_florence_config(encoder: str, **hub_kwargs) -> Florence2Config:
    """The config of a Florence-2 in either layout, as transformers' own class understands it."""
    config, _ = Florence2Config.get_config_dict(encoder, **hub_kwargs)
    if config.get("model_type") != Florence2Config.model_type:
        raise ValueError(f"it is no Florence-2, its config.json names the model type {config.get('model_type')!r}.")
    if not _is_microsofts(config):
        return Florence2Config.from_dict(config)
    vision = {**config["vision_config"], "model_type": Florence2VisionConfig.model_type}
    vision["embed_dim"] = vision.pop("dim_embed")
    vision["max_position_embeddings"] = vision.pop("image_pos_embed")["max_pos_embeddings"]
    vision["max_temporal_embeddings"] = vision.pop("visual_temporal_embedding")["max_temporal_embeddings"]
    return Florence2Config(vision_config=vision, text_config={**config["text_config"], "model_type": "bart"})


def fit_florence_config(config: Florence2Config, weights: Mapping[str, torch.Tensor]) -> None:
    """Takes the lengths of the tables from the weights: released configs do not always tell the truth about them."""
    text, vision = config.text_config, config.vision_config
    text.vocab_size = len(weights[FLORENCE_EMBEDDINGS[0]])
    text.max_position_embeddings = len(weights["language_model.encoder.embed_positions.weight"]) - 2  # BART's offset
    projector = "multi_modal_projector."
    vision.max_position_embeddings = len(weights[projector + "image_position_embed.row_embeddings.weight"])
    vision.max_temporal_embeddings = len(weights[projector + "visual_temporal_embed.pos_idx_to_embed"])


def load_florence(encoder: str, dtype: torch.dtype | str = "auto", **hub_kwargs) -> Florence2Model:
    """A Florence-2 in either layout, without its language head."""
    config = load_florence_config(encoder, **hub_kwargs)
    if not _is_microsofts(Florence2Config.get_config_dict(encoder, **hub_kwargs)[0]):
        return load_part(Florence2ForConditionalGeneration, encoder, dtype=dtype, **hub_kwargs).model
    find = functools.partial(cached_file, encoder, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if path := find("model.safetensors"):
        weights = load_file(path)
    elif path := find("pytorch_model.bin"):
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    else:
        raise OSError("there is neither a model.safetensors nor a pytorch_model.bin.")
    weights = {rename_florence_key(key): weight for key, weight in weights.items()}
    projection = "multi_modal_projector.image_projection.weight"
    weights[projection] = weights[projection].T.contiguous()
    # Whichever of the tied copies, lm_head among them, the file holds.
    copies = [weights.pop(key) for key in (*FLORENCE_EMBEDDINGS, "language_model.lm_head.weight") if key in weights]
    if copies:
        weights[FLORENCE_EMBEDDINGS[0]] = copies[0]
    weights.pop("language_model.final_logits_bias", None)
    fit_florence_config(config, weights)
    dtype = weights[projection].dtype if dtype == "auto" else dtype
    return load_part(Florence2Model, None, config=config, state_dict=weights, dtype=dtype)


def load_part(part_class, source: str | None, **kwargs):
    """A pretrained part with all of its weights: the libraries would put random numbers where one is missing."""
    part, info = part_class.from_pretrained(source, output_loading_info=True, **kwargs)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} of its weights, such as {missing[0]}.")
    return part


def tokenize_prompt(encoder: str, prompt: str = TASK_PROMPT, **hub_kwargs) -> list[int]:
    """The task prompt in a Florence-2's token ids, <s> and </s> included."""
    return AutoTokenizer.from_pretrained(encoder, **hub_kwargs)(prompt).input_ids


def tokenize_empty_prompt(decoder: str, positions: int, **hub_kwargs) -> list[int]:
    """The empty prompt in the token ids of a Stable Diffusion's text encoder, padded to its positions."""
    tokenizer = AutoTokenizer.from_pretrained(decoder, subfolder="tokenizer", **hub_kwargs)
    return tokenizer("", padding="max_length", max_length=positions).input_ids


def _is_microsofts(config):
    return "dim_embed" in config.get("vision_config", {})


def record_origins(config: VLVConfig, encoder: str, decoder: str | None, caption_head: str | None) -> None:
    """Notes of which models on the Hub the parts are; a folder of this machine says nothing on the next."""
    sources = (encoder, decoder, caption_head)
    encoder, decoder, caption_head = ("" if not source or Path(source).is_dir() else str(source) for source in sources)
    config.encoder_config._name_or_path = encoder
    config.text_encoder_config._name_or_path = decoder
    if config.caption_config is not None:
        config.caption_config._name_or_path = caption_head
    for part in (config.decoder_config or {}).values():
        part["_name_or_path"] = decoder


def module_weights(module):
    """The module's weights and persistent buffers, what is tied only once: older releases untie what comes twice."""
    once = dict(module.named_parameters()).keys() | dict(module.named_buffers()).keys()
    return {key: weight for key, weight in module.state_dict().items() if key in once}


@contextmanager
def reading_part(part, source):
    """Turns the libraries' errors into one sentence that names the part and the place."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        if not Path(source).is_dir() and isinstance(error, OSError):
            reason = f"there is no such folder, and no such model could be had from the Hub ({reason})"
        raise (OSError if isinstance(error, OSError) else ValueError)(
            f"The {part} cannot be read from {source}: {reason}"
        ) from error


__all__ = ["VLVForConditionalGeneration", "VLVModel", "VLVOutput"]
