"""VLV (Vision-Language-Vision) auto-encoder, arXiv 2507.07104.

The data flow, with Q queries, D the encoder's width, E the text encoder's, L the caption head's:

    pixel_values (B, 3, H, W) ─ Florence-2, asked by the queries ─► (B, Q, D) ─ projection ─► caption_embeds (B, Q, E)
    caption_embeds ─ CLIP text encoder, entered at its embedding layer ─► context (B, Q, E)
    context ─ frozen UNet and VAE ─► the image again               (stage 1 trains this: the denoising loss)
    context ─ prefix_projection ─► (B, Q, L) ─ LLM ─► the caption  (stage 2 trains this: the caption loss)
"""

import copy
import inspect
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.training_utils import compute_snr
from diffusers.utils.torch_utils import randn_tensor
from transformers import AutoModelForCausalLM, Florence2Model, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, cached_file

# A model loaded from the Hub imports every file of its repo here, so that saving it copies all of them.
try:
    from .chat_vlv import find_image  # noqa: F401  (transformers 5.0 copies what this file names, and no further)
    from .components_vlv import HUB_KWARGS, TASK_PROMPT, load_components
    from .configuration_vlv import VLVConfig
    from .images_vlv import load_image  # noqa: F401
    from .layers_vlv import VLVProjection, VLVTextEncoder, cast_for, check_batch, check_images, check_pixels, device_of
    from .pipeline_vlv import VLVImageToTextPipeline  # noqa: F401
    from .processing_vlv import VLVProcessor  # noqa: F401
    from .stopping_vlv import stopping_criteria
except ImportError:
    from components_vlv import HUB_KWARGS, TASK_PROMPT, load_components
    from configuration_vlv import VLVConfig
    from layers_vlv import VLVProjection, VLVTextEncoder, cast_for, check_batch, check_images, check_pixels, device_of
    from stopping_vlv import stopping_criteria

# The files of a Hub repo's code. `save_pretrained` writes them beside the weights.
CODE_FILES = (
    *("configuration_vlv.py", "modeling_vlv.py", "layers_vlv.py", "components_vlv.py"),
    *("processing_vlv.py", "images_vlv.py", "chat_vlv.py", "pipeline_vlv.py", "stopping_vlv.py"),
)
# What each stage trains by default (paper section 3; the table in docs/training.md).
STAGES = {
    "autoencode": ("queries", "projection", "language_model"),
    "caption": ("prefix_projection", "caption_head"),
    "frozen": (),
}


@dataclass
class VLVOutput(ModelOutput):
    """
    Output of [`VLVModel`]. A field is `None` where the inputs did not ask for it.

    Args:
        loss (`torch.FloatTensor` of shape `()`): the sum of the losses below.
        denoising_loss (`torch.FloatTensor` of shape `()`): stage 1, MSE or L1 in latent units.
        caption_loss (`torch.FloatTensor` of shape `()`): stage 2, nats per caption token, including the end-of-text.
        logits (`torch.FloatTensor` of shape `(B, T + 1, vocabulary)`): `logits[:, i]` predicts `input_ids[:, i]`, and
            the last position predicts the token after them.
        caption_embeds (`torch.FloatTensor` of shape `(B, Q, E)`): the bottleneck.
        context (`torch.FloatTensor` of shape `(B, Q, E)`): the text encoder's output for the caption embeddings.
        hidden_states, attentions (tuples of `torch.FloatTensor`): the caption head's, over prefix and caption.
    """

    loss: torch.FloatTensor | None = None
    denoising_loss: torch.FloatTensor | None = None
    caption_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    caption_embeds: torch.FloatTensor | None = None
    context: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class VLVPreTrainedModel(PreTrainedModel):
    config_class = VLVConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: Collection[str] = ["BasicTransformerBlock", "ResnetBlock2D", "VLVTextEncoder"]
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
        """As `PreTrainedModel.from_pretrained`, which unfreezes all weights: this freezes the decoder again."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_decoder()
        return loaded

    def save_pretrained(self, save_directory, is_main_process=True, **kwargs):
        """As `PreTrainedModel.save_pretrained`. It also writes the repo's code, so that the folder is complete."""
        for adapter in getattr(self, "peft_config", {}).values():
            if Path(adapter.base_model_name_or_path or "").exists():  # a local folder means nothing elsewhere
                adapter.base_model_name_or_path = None
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        for name in CODE_FILES:
            # The module cache of code from the Hub holds only the files that have been imported so far.
            source = Path(__file__).parent / name
            if not source.is_file():
                source = Path(cached_file(self.config._name_or_path, name))
            target = Path(save_directory) / name
            if not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)


class VLVModel(VLVPreTrainedModel, GenerationMixin):
    """
    The whole auto-encoder: Florence-2 encoder, frozen diffusion decoder, and the LLM that writes captions.

    `config.decoder_config=None` leaves out the decoder, `config.caption_config=None` the LLM.
    [`VLVForConditionalGeneration`] always leaves out the decoder.

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
            with torch.device("cpu"):  # its tables are not weights and must never be on the meta device
                self.noise_scheduler = DDPMScheduler.from_config(config.decoder_config["scheduler"])
        self.prefix_projection = self.caption_head = None
        if config.caption_config is not None:
            self.prefix_projection = VLVProjection(context_width, config.caption_config.hidden_size)
            self.caption_head = AutoModelForCausalLM.from_config(config.caption_config)
        # A checkpoint may hold parts that this model leaves out. Their weights are skipped without a warning.
        absent = [name for name, part in self.named_parts() if part is None]
        self._keys_to_ignore_on_load_unexpected = [rf"^{name}\." for name in absent]
        self.post_init()
        # FSDP refuses the name of a layer that the model lacks, such as the UNet's where there is no decoder.
        self._no_split_modules = {type(module).__name__ for module in self.modules()} & set(self._no_split_modules)
        self.freeze_decoder()

    # ---- parts: what trains and what is frozen -------------------------------------------------------------

    def named_parts(self) -> Iterable[tuple[str, torch.nn.Module | torch.nn.Parameter | None]]:
        """The parts that [`set_stage`] can train, by name. Together they hold all of the model's weights."""
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
        Sets which parts train, and keeps frozen parts in eval mode. Nothing else needs to set `requires_grad`.

        Args:
            stage (`str`): `"autoencode"` (stage 1), `"caption"` (stage 2) or `"frozen"`.
            train (sequence of `str`, *optional*): part names (see `named_parts`) instead of the stage's own.

        Raises:
            ValueError: the stage or part is unknown, or this checkpoint does not have the part.
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
        if "word_embeddings" not in train:  # they are tied into both halves of the language model
            self.encoder.language_model.shared.requires_grad_(False)
        return self.train(self.training)

    def freeze_decoder(self) -> None:
        """Freezes text encoder, UNet and VAE. They train in neither stage."""
        for part in (self.text_encoder, self.unet, self.vae):
            if part is not None:
                part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "VLVModel":
        """As `Module.train`, but a frozen part stays in eval mode, so that the teacher has no dropout."""
        super().train(mode)
        # The word embeddings are tied into the language model. Training them alone does not put it in train mode.
        shared = self.encoder.language_model.shared.weight
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
        """Saves activation memory at the cost of a second forward pass. `parts`: encoder, unet, caption_head."""
        for name in parts:
            part = getattr(self, name)
            if name == "unet" and part is not None:
                part.enable_gradient_checkpointing()
            elif part is not None:  # newer releases renamed the method and pass it more arguments
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
        """The part that owns the token embeddings: the caption head, or Florence-2 without one."""
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
        check_pixels(pixel_values, self.config.encoder_config.vision_config)
        features = self.encoder.vision_tower(cast_for(self.encoder.vision_tower, pixel_values)).last_hidden_state
        return self.encoder.multi_modal_projector(features)

    def encode(
        self, pixel_values: torch.Tensor | None = None, image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Encodes images as caption embeddings (paper section 3.1).

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): images from the processor, of any float dtype.
            image_features (`torch.FloatTensor` of shape `(B, T, D)`): instead, their [`get_image_features`].

        Returns:
            `torch.FloatTensor` of shape `(B, Q, E)`: the caption embeddings.
        """
        if image_features is None:
            image_features = self.get_image_features(pixel_values)
        language_model = self.encoder.language_model
        batch_size = image_features.shape[0]
        prompt = torch.tensor(self.config.prompt_ids, dtype=torch.long, device=device_of(language_model))
        prompt = language_model.encoder.embed_tokens(prompt).expand(batch_size, -1, -1)
        tokens = torch.cat([image_features.to(prompt), prompt], dim=1)  # (B, T + P, D)
        memory = language_model.encoder(inputs_embeds=tokens).last_hidden_state
        if self.queries.is_meta and hasattr(self, "_hf_hook"):  # offloaded, and not in forward(): load them
            self._hf_hook.pre_forward(self)
        queries = self.queries.to(prompt).expand(batch_size, -1, -1)
        answers = language_model.decoder(
            inputs_embeds=queries, encoder_hidden_states=memory, use_cache=False
        ).last_hidden_state  # (B, Q, D)
        return self.projection(cast_for(self.projection, answers))

    def encode_context(self, caption_embeds: torch.Tensor) -> torch.Tensor:
        """`caption_embeds` (B, Q, E) -> `context` (B, Q, E), which the UNet and the caption head read."""
        text = self.config.text_encoder_config
        width, positions = text.hidden_size, text.max_position_embeddings
        if caption_embeds.ndim != 3 or caption_embeds.shape[-1] != width or caption_embeds.shape[1] > positions:
            raise ValueError(
                f"caption_embeds have shape {tuple(caption_embeds.shape)}: expected (batch, queries, {width}) with at "
                f"most {positions} queries, as encode() returns them."
            )
        caption_embeds = cast_for(self.text_encoder, caption_embeds)
        return caption_embeds if self.config.bypass_text_encoder else self.text_encoder(inputs_embeds=caption_embeds)

    def empty_context(self, length: int | None = None) -> torch.Tensor:
        """The unconditional context (1, Q, E): the text encoder's output for the empty prompt, cut to `length`."""
        length = self.config.num_queries if length is None else length
        if len(self.config.empty_prompt_ids) < length:
            raise ValueError(
                f"config.empty_prompt_ids holds {len(self.config.empty_prompt_ids)} ids, but the context is {length} "
                "long: set it to the empty prompt, padded to the text encoder's positions."
            )
        ids = torch.tensor([self.config.empty_prompt_ids[:length]], device=device_of(self.text_encoder))
        return self.text_encoder(input_ids=ids)

    # ---- the frozen decoder: context -> image --------------------------------------------------------------

    def encode_latents(self, decoder_pixel_values: torch.Tensor, sample: bool | None = None) -> torch.Tensor:
        """
        `decoder_pixel_values` (B, 3, h, w) in -1..1 -> `latents` (B, C, h/f, w/f), shifted and scaled as the UNet
        expects them. `sample` draws them from the posterior instead of taking its mean; by default
        `config.sample_latents` decides.
        """
        self._require_decoder("encode latents")
        source = "in -1..1: use processor(..., return_decoder_pixel_values=True)"
        check_images("decoder_pixel_values", decoder_pixel_values, source)
        if (
            not torch.compiler.is_compiling() and not decoder_pixel_values.abs().amax() <= 1.01
        ):  # `not <=` also finds NaN
            raise ValueError(f"decoder_pixel_values are not {source}.")
        posterior = self.vae.encode(cast_for(self.vae, decoder_pixel_values)).latent_dist
        sample = self.config.sample_latents if sample is None else sample
        latents = posterior.sample() if sample else posterior.mean
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """`latents` (B, C, h/f, w/f), as [`encode_latents`] returns them -> images (B, 3, h, w), about -1..1."""
        self._require_decoder("decode latents")
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return self.vae.decode(cast_for(self.vae, latents)).sample

    def denoise(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The UNet's prediction (B, C, h/f, w/f): noise or velocity, as the scheduler's config says."""
        return self.unet(
            cast_for(self.unet, noisy_latents), timesteps, encoder_hidden_states=cast_for(self.unet, context)
        ).sample

    def compute_denoising_loss(
        self,
        latents: torch.Tensor,
        context: torch.Tensor,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The stage-1 objective (paper section 3.1): the UNet predicts the noise in the noisy `latents` (B, C, h/f, w/f)
        from `context` (B, Q, E) alone. `noise` (shaped as latents) and `timesteps` (B,) are drawn where not given.
        """
        scheduler = self.noise_scheduler
        latents = latents.to(device_of(self.unet))
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
            guidance_scale (`float`): 1.0 switches guidance off, which halves the work.
            generator (`torch.Generator` or one per image): makes the result repeatable. With one per image, an image
                does not depend on the others in its batch.
            height, width (`int`, *optional*): pixels; `config.image_size` or the UNet's own size by default.
            scheduler (*optional*): a diffusers scheduler. The default is second-order DPM-Solver++ (arXiv 2211.01095)
                on the checkpoint's own noise schedule, which needs the fewest steps (docs/results.md).
            output_type (`str`): `"pil"`, `"np"` or `"pt"`.
            callback_on_step_end: called as `(model, step, timestep, {"latents": latents})` after each step, as in
                diffusers' pipelines. The dictionary that it returns may hold new latents.

        Returns:
            A list of B `PIL.Image` (or an array or tensor in 0..1).

        Raises:
            ValueError: the checkpoint has no decoder, or not exactly one input is given.
        """
        self._require_decoder("reconstruct")
        context = self._context(pixel_values, caption_embeds)
        if scheduler is None:
            scheduler = DPMSolverMultistepScheduler.from_config(self.config.decoder_config["scheduler"])
        scheduler.set_timesteps(num_inference_steps, device=context.device)
        step_accepts = inspect.signature(scheduler.step).parameters
        step_arguments = {"generator": generator} if "generator" in step_accepts else {}
        context = cast_for(self.unet, context)
        batch_size = context.shape[0]
        guided = guidance_scale > 1
        if guided:
            empty = cast_for(self.unet, self.empty_context(context.shape[1]))
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
        """The prefix, then the caption's tokens: embeddings (B, Q + T, L) and their attention mask (B, Q + T)."""
        prefix = self.prefix_projection(cast_for(self.prefix_projection, context))
        embeddings = self.caption_head.get_input_embeddings()
        prefix = prefix.to(embeddings.weight.dtype)
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        if input_ids is None or input_ids.shape[1] == 0:
            return prefix, mask
        check_batch(context, input_ids=input_ids, attention_mask=attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeds = torch.cat([prefix, embeddings(input_ids.to(device_of(embeddings))).to(prefix.device)], dim=1)
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
        Writes captions with the caption head's `GenerationMixin.generate`, which continues each image's prefix. It
        takes all of that method's arguments (beams, sampling, streamers, logits processors, `max_new_tokens`, ...).

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): images to caption; or
            caption_embeds (`torch.FloatTensor` of shape `(B, Q, E)`): their embeddings, from [`encode`] or composed.
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): the beginning of each caption, padded on
                either side, with its `attention_mask`.

        Returns:
            `torch.LongTensor` of shape `(B, new tokens)`: the new tokens only, without `input_ids`.

        Raises:
            ValueError: the checkpoint has no caption head, or not exactly one input is given.
        """
        self._require_caption_head("caption")
        context = self._context(pixel_values, caption_embeds)
        inputs_embeds, attention_mask = self._caption_inputs(context, input_ids, attention_mask)
        # Padding moves to the left of the prefix, because generation counts positions from the end of the padding.
        order = attention_mask.argsort(dim=1, stable=True)
        inputs_embeds = inputs_embeds.take_along_dim(order[..., None], dim=1)
        attention_mask = attention_mask.take_along_dim(order, dim=1)
        generation_config = copy.deepcopy(generation_config or GenerationConfig())
        # The checkpoint's settings fill in what it leaves open, as in every model of transformers.
        generation_config.update(**self.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        kwargs = generation_config.update(**kwargs)  # left over: streamer, logits_processor, ...
        kwargs["stopping_criteria"] = stopping_criteria(generation_config, kwargs.get("stopping_criteria"))
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
        The inputs decide what is computed. `decoder_pixel_values` or `latents` give the denoising loss (stage 1),
        `input_ids` the logits, `labels` the caption loss (stage 2). The context is always computed.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): images from the processor; or
            image_features (`torch.FloatTensor` of shape `(B, T, D)`): cached image tokens ([`get_image_features`]), or
            caption_embeds (`torch.FloatTensor` of shape `(B, Q, E)`): cached caption embeddings ([`encode`]).
            decoder_pixel_values (`torch.FloatTensor` of shape `(B, 3, h, w)`): the same images in -1..1; or
            latents (`torch.FloatTensor` of shape `(B, C, h/f, w/f)`): cached latents ([`encode_latents`]).
            noise, timesteps: shaped as latents and `(B,)`; fixed instead of drawn, for comparable evaluations.
            input_ids, attention_mask (`torch.LongTensor` of shape `(B, T)`): the captions, padded on the right.
            labels (`torch.LongTensor` of shape `(B, T)`): the captions again, with -100 where no loss is taken. They
                also serve as `input_ids` where those are not given.
            num_items_in_batch: the label count to divide by, which Trainer gives under gradient accumulation.
            output_hidden_states, output_attentions (`bool`, *optional*): also return the caption head's.

        Returns:
            [`VLVOutput`].
        """
        if caption_embeds is None:
            caption_embeds = self.encode(pixel_values, image_features)
        context = self.encode_context(caption_embeds)
        denoising_loss = caption_loss = None
        head_output = {}
        check_batch(context, decoder_pixel_values=decoder_pixel_values, latents=latents, labels=labels)
        check_batch(context, noise=noise, timesteps=timesteps)
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
            extra = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
            # Of the prefix only the last position, which predicts the first token, is projected to the vocabulary.
            kept = input_ids.shape[1] + 1
            if not isinstance(kept, int):  # a symbol of torch.export, which the caption head would take for an index
                kept = torch.arange(-kept, 0, device=context.device)
            head_output = self.caption_head(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                use_cache=False,
                logits_to_keep=kept,
                **{key: (getattr(self.config, key) or None) if on is None else on for key, on in extra.items()},
            )
            if labels is not None:
                caption_loss = self.caption_head.loss_function(
                    logits=head_output.logits,
                    labels=F.pad(labels, (1, 0), value=-100),  # the prefix's last position has no label of its own
                    vocab_size=head_output.logits.shape[-1],
                    num_items_in_batch=num_items_in_batch,
                )
        losses = [loss for loss in (denoising_loss, caption_loss) if loss is not None]
        # Built last, because in transformers 5.0 a field that is set later is missing from the output's keys.
        output = VLVOutput(
            loss=sum(loss.to(context.device) for loss in losses) if losses else None,
            denoising_loss=denoising_loss,
            caption_loss=caption_loss,
            caption_embeds=caption_embeds,
            context=context,
            **{name: head_output.get(name) for name in ("logits", "hidden_states", "attentions")},
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
        A VLV from pretrained parts, with new queries and projections (see `components_vlv.py`).

        Args:
            encoder (`str`): id or folder of a Florence-2, in transformers' own or in Microsoft's remote-code layout.
            decoder (`str`): id or folder of a Stable Diffusion 1.x or 2.x in diffusers' layout.
            caption_head (`str`, *optional*): id or folder of a decoder-only language model.
            num_queries (`int`, *optional*): the text encoder's positions (77 for CLIP's) by default.
            image_size (`int`, *optional*): pixels of a reconstruction's side; the UNet's own by default.
            prompt (`str`): the task prompt, in words.
            dtype (`torch.dtype`, *optional*): of all weights; by default the narrowest that holds each weight exactly.
            kwargs: `revision`, `token`, `local_files_only`, `cache_dir`, ... are used to read each part; the rest
                (`device_map`, `quantization_config`, `attn_implementation`, ...) goes to `from_pretrained`.

        Raises:
            OSError: a part cannot be found or read.
            ValueError: a part is of another kind, or the parts do not fit; the sentence names both sizes.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        components = load_components(
            encoder, decoder, caption_head, num_queries, image_size, prompt, dtype, **hub_kwargs
        )
        # from_pretrained places the weights, ties what each part ties, and initialises what no part has.
        model = cls.from_pretrained(
            None, config=components.config, state_dict=components.weights, dtype=components.dtype, **kwargs
        )
        if components.generation_config is not None:
            model.generation_config = components.generation_config
        return model

    # ---- checks --------------------------------------------------------------------------------------------

    def _context(self, pixel_values, caption_embeds):
        if (pixel_values is None) == (caption_embeds is None):
            raise ValueError("Give either pixel_values or caption_embeds.")
        return self.encode_context(self.encode(pixel_values) if caption_embeds is None else caption_embeds)

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


# GenerationMixin is named again because AutoModelForImageTextToText makes a new class, which cannot be pickled, of a
# repo's class that does not have it as a direct base.
class VLVForConditionalGeneration(VLVModel, GenerationMixin):
    """The captioner alone: a [`VLVModel`] that never builds or reads UNet and VAE, even if the checkpoint has them."""

    def __init__(self, config: VLVConfig):
        config = copy.copy(config)  # the caller's config keeps its decoder
        config.decoder_config = None
        super().__init__(config)
        self.loss_type = None  # Trainer would infer shifted labels from the class name, and miscount them


__all__ = ["VLVForConditionalGeneration", "VLVModel", "VLVOutput"]
