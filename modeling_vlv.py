"""VLV (Vision-Language-Vision) auto-encoder, arXiv 2507.07104.

The data flow, with Q queries, D the encoder's width, E the text encoder's, L the caption head's:

    pixel_values (B, 3, H, W) ─ Florence-2, with queries as words ─► (B, Q, D) ─ projection ─► caption_embeds (B, Q, E)
    caption_embeds ─ CLIP text encoder, in place of word embeddings ─► context (B, Q, E)
                     (without a text encoder, the caption embeddings are the context)
    context ─ frozen teacher: denoiser and VAE ─► the image again  (stage 1 trains this: the denoising loss)
    context ─ prefix_projection ─► (B, Q, L) ─ LLM ─► the caption  (stage 2 trains this: the caption loss)
"""

import copy
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Florence2Model, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, cached_file

# A model loaded from the Hub imports every file of its repo here, so that saving it copies all of them.
try:
    from .chat_vlv import find_image  # noqa: F401  (transformers 5.0 copies what this file names, and no further)
    from .components_vlv import HUB_KWARGS, TASK_PROMPT, load_components
    from .configuration_vlv import VLVConfig
    from .decoders_vlv import Prompt  # noqa: F401
    from .diffusion_vlv import VLVDiffusionMixin
    from .families_vlv import build_decoder
    from .images_vlv import load_image  # noqa: F401
    from .layers_vlv import VLVProjection, VLVTextEncoder, cast_for, check_batch, check_length, check_pixels, device_of
    from .pipeline_vlv import VLVImageToTextPipeline  # noqa: F401
    from .processing_vlv import VLVProcessor  # noqa: F401
    from .prompts_vlv import find_prompt  # noqa: F401
    from .sampling_vlv import SeededSearch
    from .stopping_vlv import stopping_criteria
    from .wording_vlv import Wishes  # noqa: F401
except ImportError:
    from components_vlv import HUB_KWARGS, TASK_PROMPT, load_components
    from configuration_vlv import VLVConfig
    from diffusion_vlv import VLVDiffusionMixin
    from families_vlv import build_decoder
    from layers_vlv import VLVProjection, VLVTextEncoder, cast_for, check_batch, check_length, check_pixels, device_of
    from sampling_vlv import SeededSearch
    from stopping_vlv import stopping_criteria

# The files of a Hub repo's code. `save_pretrained` writes them beside the weights.
CODE_FILES = (
    *("configuration_vlv.py", "modeling_vlv.py", "layers_vlv.py", "components_vlv.py", "decoders_vlv.py"),
    *("families_vlv.py", "diffusion_vlv.py", "processing_vlv.py", "images_vlv.py", "pipeline_vlv.py"),
    *("stopping_vlv.py", "sampling_vlv.py", "chat_vlv.py", "prompts_vlv.py", "wording_vlv.py"),
)
# Parts and buffers that a checkpoint may hold and a model leave out.
PARTS_LEFT_OUT = (
    *("text_encoder", "unet", "transformer", "vae", "pooled_projection", "empty_prompt_embeds", "empty_pooled_embeds"),
    *("prefix_projection", "caption_head"),
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
            for name in module.empty_buffers:
                init.zeros_(getattr(module, name))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As `PreTrainedModel.from_pretrained`, but the decoder is frozen again and gets its tables back."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze_decoder()
        if model.teacher is not None:
            for name in (model.teacher.denoiser, "vae"):
                model.teacher.restore_tables(name, getattr(model, name))
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


class VLVModel(VLVDiffusionMixin, VLVPreTrainedModel, GenerationMixin):
    """
    The whole auto-encoder: Florence-2 encoder, frozen diffusion decoder, and the LLM that writes captions.

    `config.decoder_config=None` leaves out the decoder, `config.caption_config=None` the LLM.
    [`VLVForConditionalGeneration`] always leaves out the decoder.

    Example:

    ```python
    >>> import vlv
    >>> from transformers import AutoModel, AutoProcessor

    >>> repo = vlv.bundled_checkpoint()
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
        width = config.caption_embeds_width
        # Where nothing follows the projection, the context may be very wide: its inner width is the encoder's then.
        inner = encoder_width if config.text_encoder_config is None else None
        # Parts that transformers builds from a config have the dtype that it names, which is that of an earlier run.
        dtype = torch.get_default_dtype()
        config.encoder_config.text_config.dtype = dtype
        self.encoder = Florence2Model(config.encoder_config)
        self.queries = torch.nn.Parameter(torch.empty(config.num_queries, encoder_width))
        self.projection = VLVProjection(encoder_width, width, inner)
        self.text_encoder = None
        if config.text_encoder_config is not None:
            self.text_encoder = VLVTextEncoder(config.text_encoder_config)
        self.teacher = self.unet = self.transformer = self.vae = self.pooled_projection = None
        self.empty_buffers: tuple[str, ...] = ()  # what stands for the empty prompt where there is no text encoder
        if config.decoder_config is not None:
            self.teacher = build_decoder(config.decoder_config)
            for name, part in self.teacher.build().items():
                setattr(self, name, part)
            if self.text_encoder is None:
                length = config.decoder_config["empty_prompt_length"]
                self.empty_buffers = ("empty_prompt_embeds",)
                self.register_buffer("empty_prompt_embeds", torch.zeros(1, length, width))
            if self.teacher.pooled_width is not None:
                self.empty_buffers += ("empty_pooled_embeds",)
                self.pooled_projection = VLVProjection(width, self.teacher.pooled_width, inner)
                self.register_buffer("empty_pooled_embeds", torch.zeros(1, self.teacher.pooled_width))
        self.prefix_projection = self.caption_head = None
        if config.caption_config is not None:
            self.prefix_projection = VLVProjection(width, config.caption_config.hidden_size)
            self.caption_head = AutoModelForCausalLM.from_config(config.caption_config, dtype=dtype)
        # A checkpoint may hold parts that this model leaves out. Their weights are skipped without a warning.
        absent = [name for name in PARTS_LEFT_OUT if getattr(self, name, None) is None]
        self._keys_to_ignore_on_load_unexpected = [rf"^{name}(\.|$)" for name in absent]
        self.post_init()
        # FSDP refuses the name of a layer that the model lacks, such as the UNet's where there is no decoder.
        layers = {*self._no_split_modules, *(getattr(self.transformer, "_no_split_modules", None) or ())}
        self._no_split_modules = {type(module).__name__ for module in self.modules()} & layers
        self.freeze_decoder()

    # ---- parts: what trains and what is frozen -------------------------------------------------------------

    def named_parts(self) -> Iterable[tuple[str, torch.nn.Module | torch.nn.Parameter | None]]:
        """The parts that [`set_stage`] can train, by name. Together they hold all of the model's weights."""
        language_model, projection = self.encoder.language_model, self.projection
        if self.pooled_projection is not None:
            projection = torch.nn.ModuleList([projection, self.pooled_projection])
        return (
            ("vision_tower", self.encoder.vision_tower),
            ("image_projection", self.encoder.multi_modal_projector),
            ("word_embeddings", language_model.shared),
            ("language_model", torch.nn.ModuleList([language_model.encoder, language_model.decoder])),
            ("queries", self.queries),
            ("projection", projection),
            ("text_encoder", self.text_encoder),
            ("unet" if self.teacher is None else self.teacher.denoiser, self.denoiser),
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
        needed = {"autoencode": "vae", "caption": "caption_head"}.get(stage)
        if needed and parts[needed] is None:
            raise ValueError(f"Stage {stage!r} needs the part {needed}, which this checkpoint does not have.")
        self.requires_grad_(False)
        for name in train:
            parts[name].requires_grad_(True)
        if "word_embeddings" not in train:  # they are tied into both halves of the language model
            self.encoder.language_model.shared.requires_grad_(False)
        return self.train(self.training)

    def freeze_decoder(self) -> None:
        """Freezes text encoder, denoiser and VAE. They train in neither stage."""
        for part in (self.text_encoder, self.denoiser, self.vae):
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
        parts: Sequence[str] = ("encoder", "unet", "transformer", "caption_head"),
        **kwargs,
    ) -> None:
        """
        Saves activation memory at the cost of a second forward pass. `parts`: encoder, unet or transformer (whichever
        the teacher has), caption_head.
        """
        for name in parts:
            part = getattr(self, name)
            if part is not None and part is self.denoiser:
                part.enable_gradient_checkpointing()
            elif part is not None:  # newer releases renamed the method and pass it more arguments
                enable = getattr(part, "activation_checkpointing_enable", part.gradient_checkpointing_enable)
                enable(gradient_checkpointing_kwargs or {"use_reentrant": False}, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Switches gradient checkpointing off in every part."""
        if self.denoiser is not None:
            self.denoiser.disable_gradient_checkpointing()
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
        self,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        num_queries: int | None = None,
    ) -> torch.Tensor:
        """
        Encodes images as caption embeddings (paper section 3.1).

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): images from the processor, of any float dtype.
            image_features (`torch.FloatTensor` of shape `(B, T, D)`): instead, their [`get_image_features`].
            num_queries (`int`, *optional*): Q, how many leading queries ask; all by default. They see none of those
                behind them, so these are the leading caption embeddings of the whole. A model that was trained with
                `config.nested_queries` puts the most important into the first ones.

        Returns:
            `torch.FloatTensor` of shape `(B, Q, E)`: the caption embeddings.

        Raises:
            ValueError: `num_queries` is less than 1 or more than the model has.
        """
        num_queries = self.check_num_queries(num_queries)
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
        queries = self.queries[:num_queries].to(prompt).expand(batch_size, -1, -1)
        answers = language_model.decoder(
            inputs_embeds=queries, encoder_hidden_states=memory, use_cache=False
        ).last_hidden_state  # (B, Q, D)
        return self.projection(cast_for(self.projection, answers))

    def encode_context(self, caption_embeds: torch.Tensor) -> torch.Tensor:
        """`caption_embeds` (B, Q, E) -> `context` (B, Q, E), which the denoiser and the caption head read."""
        width, positions = self.config.caption_embeds_width, self.config.positions
        if (
            caption_embeds.ndim != 3
            or caption_embeds.shape[-1] != width
            or (positions is not None and caption_embeds.shape[1] > positions)
        ):
            limit = "" if positions is None else f" with at most {positions} queries"
            raise ValueError(
                f"caption_embeds have shape {tuple(caption_embeds.shape)}: expected (batch, queries, {width}){limit}, "
                "as encode() returns them."
            )
        if self.text_encoder is None:
            return caption_embeds
        caption_embeds = cast_for(self.text_encoder, caption_embeds)
        return caption_embeds if self.config.bypass_text_encoder else self.text_encoder(inputs_embeds=caption_embeds)

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
        num_queries: int | None = None,
        generation_config: GenerationConfig | None = None,
        seed: int | Sequence[int] | None = None,
        **kwargs,
    ):
        """
        Writes captions with the caption head's `GenerationMixin.generate`, which continues each image's prefix. It
        takes all of that method's arguments (beams, sampling, streamers, logits processors, `max_new_tokens`, ...).

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): images to caption; or
            caption_embeds (`torch.FloatTensor` of shape `(B, Q, E)`): their embeddings, from [`encode`] or composed.
            num_queries (`int`, *optional*): read only so many of the leading caption embeddings (see [`encode`]).
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): the prompt and the beginning of each caption,
                as the processor gives them, padded on either side, with their `attention_mask`.
            seed (`int` or one for each image, *optional*): with `do_sample=True`, equal seeds draw equal captions of
                an image, whatever else is in the batch. The captions of one image are different draws.

        Returns:
            `torch.LongTensor` of shape `(B, new tokens)`: the new tokens only, without `input_ids`.

        Raises:
            ValueError: the checkpoint has no caption head, not exactly one input is given, there are fewer queries
                than `num_queries`, prompt and beginning leave no room for a caption, or a `seed` is given for sampling
                by beams.
        """
        self._require_caption_head("caption")
        context = self._context(pixel_values, caption_embeds, num_queries)
        inputs_embeds, attention_mask = self._caption_inputs(context, input_ids, attention_mask)
        if input_ids is not None:
            self.check_text_length(int(attention_mask.sum(1).max()) - context.shape[1], context.shape[1])
        # Padding moves to the left of the prefix, because generation counts positions from the end of the padding.
        order = attention_mask.argsort(dim=1, stable=True)
        inputs_embeds = inputs_embeds.take_along_dim(order[..., None], dim=1)
        attention_mask = attention_mask.take_along_dim(order, dim=1)
        generation_config = copy.deepcopy(generation_config or GenerationConfig())
        # The checkpoint's settings fill in what it leaves open, as in every model of transformers.
        generation_config.update(**self.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        kwargs = generation_config.update(**kwargs)  # left over: streamer, logits_processor, ...
        kwargs["stopping_criteria"] = stopping_criteria(generation_config, kwargs.get("stopping_criteria"))
        if seed is not None and generation_config.do_sample:
            kwargs["custom_generate"] = SeededSearch(seed, len(inputs_embeds), generation_config)
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
            input_ids, attention_mask (`torch.LongTensor` of shape `(B, T)`): the captions, each after its prompt if it
                has one, padded on the right.
            labels (`torch.LongTensor` of shape `(B, T)`): the captions again, with -100 where no loss is taken. They
                also serve as `input_ids` where those are not given.
            num_items_in_batch: the label count to divide by, which Trainer gives under gradient accumulation.
            output_hidden_states, output_attentions (`bool`, *optional*): also return the caption head's.

        Returns:
            [`VLVOutput`].
        """
        num_queries = self._draw_num_queries() if self.training and self.config.nested_queries else None
        if caption_embeds is None:
            caption_embeds = self.encode(pixel_values, image_features, num_queries)
        context = self.encode_context(caption_embeds[:, :num_queries])
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
        projection_start: str = "zero",
        **kwargs,
    ) -> "VLVModel":
        """
        A VLV from pretrained parts, with new queries and projections (see `components_vlv.py`).

        Args:
            encoder (`str`): id or folder of a Florence-2, in transformers' own or in Microsoft's remote-code layout.
                It reads any size that its strides divide; the processor decides which (`encoder_image_size`).
            decoder (`str`): id or folder of a text-to-image model in diffusers' layout, of a family that
                `families_vlv.py` knows.
            caption_head (`str`, *optional*): id or folder of a decoder-only language model.
            num_queries (`int`, *optional*): the text encoder's positions (77 for CLIP's) by default, else 77.
            image_size (`int`, *optional*): pixels of a reconstruction's side; the teacher's own by default.
            prompt (`str`): the task prompt, in words.
            dtype (`torch.dtype`, *optional*): of all weights; by default the narrowest that holds each weight exactly.
            projection_start (`str`): around what the new caption embeddings start: `"zero"`, or `"mean"`, that of the
                text encoder's word embeddings, or of the empty prompt's embeddings where there is no text encoder.
            kwargs: `revision`, `token`, `local_files_only`, `cache_dir`, ... are used to read each part; the rest
                (`device_map`, `quantization_config`, `attn_implementation`, ...) goes to `from_pretrained`.

        Raises:
            OSError: a part cannot be found or read.
            ValueError: a part is of another kind, or the parts do not fit; the sentence names both sizes.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        components = load_components(
            encoder, decoder, caption_head, num_queries, image_size, prompt, dtype, projection_start, **hub_kwargs
        )
        # from_pretrained places the weights, ties what each part ties, and initialises what no part has.
        model = cls.from_pretrained(
            None, config=components.config, state_dict=components.weights, dtype=components.dtype, **kwargs
        )
        if components.generation_config is not None:
            model.generation_config = components.generation_config
        return model

    # ---- checks --------------------------------------------------------------------------------------------

    def check_num_queries(self, num_queries: int | None) -> int:
        """How many leading queries to read, all of them by default; raises ValueError where there are not so many."""
        length = self.config.num_queries
        return check_length(num_queries, length, f"this checkpoint has {length} queries")

    def check_text_length(self, num_tokens: int, num_queries: int | None = None) -> None:
        """
        Raises ValueError when prompt and beginning of a caption, `num_tokens` together, leave the caption head no
        position for the caption.
        """
        positions = getattr(self.config.caption_config, "max_position_embeddings", None)
        queries = self.config.num_queries if num_queries is None else num_queries
        if positions is not None and queries + num_tokens >= positions:
            raise ValueError(
                f"The prompt and the beginning of the caption have {num_tokens} tokens: beside the image, which takes "
                f"{queries}, the caption head has {positions} positions, and one must be left for the caption. "
                "Shorten the prompt."
            )

    def _draw_num_queries(self):
        """A number of leading queries for a step: all of them in every other step, any number in the rest."""
        length = self.config.num_queries
        return length if torch.rand(()) < 0.5 else int(torch.randint(1, length + 1, ()))

    def _context(self, pixel_values, caption_embeds, num_queries=None):
        return self.encode_context(self._caption_embeds(pixel_values, caption_embeds, num_queries))

    def _caption_embeds(self, pixel_values, caption_embeds, num_queries=None):
        if (pixel_values is None) == (caption_embeds is None):
            raise ValueError("Give either pixel_values or caption_embeds.")
        if caption_embeds is None:
            return self.encode(pixel_values, num_queries=num_queries)
        length = caption_embeds.shape[1]
        return caption_embeds[
            :, : check_length(num_queries, length, f"there are {length} caption_embeds for each image")
        ]

    def _require_caption_head(self, purpose):
        if self.caption_head is None:
            raise ValueError(
                f"This checkpoint has no caption head and cannot {purpose}: train one (stage 2), or load another."
            )


# GenerationMixin is named again because AutoModelForImageTextToText makes a new class, which cannot be pickled, of a
# repo's class that does not have it as a direct base.
class VLVForConditionalGeneration(VLVModel, GenerationMixin):
    """The captioner alone: a [`VLVModel`] that never builds or reads denoiser and VAE, even if there are any."""

    def __init__(self, config: VLVConfig):
        config = copy.copy(config)  # the caller's config keeps its decoder
        config.decoder_config = None
        super().__init__(config)
        self.loss_type = None  # Trainer would infer shifted labels from the class name, and miscount them


__all__ = ["VLVForConditionalGeneration", "VLVModel", "VLVOutput"]
