"""Configuration of a VLV (Vision-Language-Vision) auto-encoder, arXiv 2507.07104."""

from transformers import AutoConfig, CLIPTextConfig, Florence2Config, PreTrainedConfig

AUTO_MAP = {
    "AutoConfig": "configuration_vlv.VLVConfig",
    "AutoProcessor": "processing_vlv.VLVProcessor",
    "AutoModel": "modeling_vlv.VLVModel",
    "AutoModelForImageTextToText": "modeling_vlv.VLVForConditionalGeneration",
}
# transformers 5 has no image-to-text task of its own, so every repo carries the pipelines for it and the other tasks.
CUSTOM_PIPELINES = {
    "image-to-text": {"impl": "pipeline_vlv.VLVImageToTextPipeline", "pt": ["AutoModelForImageTextToText"]},
    "image-text-to-text": {"impl": "pipeline_vlv.VLVImageTextToTextPipeline", "pt": ["AutoModelForImageTextToText"]},
    "image-to-image": {"impl": "pipeline_vlv.VLVReconstructionPipeline", "pt": ["AutoModel"]},
}
TIMESTEP_DENSITIES = ("uniform", "logit_normal", "mode")


class VLVConfig(PreTrainedConfig):
    r"""
    Configuration of [`VLVModel`] and [`VLVForConditionalGeneration`].

    Args:
        encoder_config (`Florence2Config` or `dict`):
            The Florence-2 that reads the image.
        text_encoder_config (`CLIPTextConfig` or `dict`, *optional*):
            The CLIP text encoder of a Stable Diffusion 1.x or 2.x; its `hidden_size` is the width E of the caption
            embeddings. `None` with a `context_width`: there is none, as with all other teachers, and the caption
            embeddings are the context.
        decoder_config (`dict`, *optional*):
            The frozen text-to-image teacher as plain diffusers dictionaries: `unet` or `transformer`, `vae`,
            `scheduler`, and the name of its pipeline as `_class_name` (`StableDiffusionPipeline` by default). Without
            a text encoder also `empty_prompt_length`, the number of embeddings that stand for the empty prompt.
            `None`: the model has no decoder and cannot reconstruct.
        caption_config (`PreTrainedConfig` or `dict`, *optional*):
            The decoder-only language model that writes the caption. `None`: the model has none and cannot caption.
        num_queries (`int`, defaults to 77):
            Number Q of learned queries, and so of caption embeddings per image; at most the text encoder's positions,
            or the teacher's where it counts them.
        image_size (`int`, *optional*):
            Height and width, in pixels, of the images that the decoder rebuilds (384 in the paper). Defaults to the
            size that the teacher was trained at.
        prompt_ids (`list[int]`):
            The task prompt, in the encoder's own token ids. It follows the image tokens into the encoder.
        empty_prompt_ids (`list[int]`):
            The empty prompt, in the text encoder's token ids, padded to its positions. It gives the unconditional
            context.
        denoising_loss (`str`, defaults to `"mse"`):
            `"mse"` or `"l1"`, between the denoiser's prediction and its target.
        min_snr_gamma (`float`, *optional*):
            Weights the denoising loss by min(SNR, gamma) (arXiv 2303.09556). `None` weights all timesteps equally.
        timestep_density (`str`, defaults to `"uniform"`):
            How training draws timesteps: `"uniform"`, or `"logit_normal"` or `"mode"` (arXiv 2403.03206).
        timestep_shift (`float`, defaults to 1.0):
            Moves the drawn timesteps towards noise (above 1) or towards the image (below 1): with t from 0 to 1, the
            image to noise, t becomes `shift * t / (1 + (shift - 1) * t)` (arXiv 2403.03206, section 5.3.2).
        noise_draws (`int`, defaults to 1):
            How many noise levels training draws for each image. The encoder runs once for all of them.
        nested_queries (`bool`, defaults to `False`):
            Whether half of the training steps draw how many of the leading queries they read, so that any number of
            them works alone (arXiv 2405.19315 does so with the image tokens of a language model).
        context_dropout (`float`, defaults to 0.0):
            Share of training images whose context is replaced by the empty prompt's.
        sample_latents (`bool`, defaults to `True`):
            Whether latents are sampled from the VAE's posterior, as in the paper. Otherwise they are its mean.
        bypass_text_encoder (`bool`, defaults to `False`):
            Whether the caption embeddings are used as the context directly, without the text encoder (the paper's
            ablation). The unconditional context always comes from the text encoder.
        context_width (`int`, *optional*):
            Width E of the caption embeddings in a model without a text encoder.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of new queries and projections.

    Raises:
        ValueError: the parts do not fit together; the sentence names both sizes.
    """

    model_type = "vlv"
    sub_configs = {
        "encoder_config": Florence2Config,
        "text_encoder_config": CLIPTextConfig,
        "caption_config": AutoConfig,
    }

    def __init__(
        self,
        encoder_config=None,
        text_encoder_config=None,
        decoder_config=None,
        caption_config=None,
        num_queries=77,
        image_size=None,
        prompt_ids=(),
        empty_prompt_ids=(),
        denoising_loss="mse",
        min_snr_gamma=None,
        timestep_density="uniform",
        timestep_shift=1.0,
        noise_draws=1,
        nested_queries=False,
        context_dropout=0.0,
        sample_latents=True,
        bypass_text_encoder=False,
        context_width=None,
        initializer_range=0.02,
        **kwargs,
    ):
        self.encoder_config = _as_config(encoder_config, Florence2Config) or Florence2Config()
        self.text_encoder_config = _as_config(text_encoder_config, CLIPTextConfig)
        if self.text_encoder_config is None and context_width is None:
            self.text_encoder_config = CLIPTextConfig()
        self.context_width = context_width
        self.caption_config = _as_config(caption_config)
        self.decoder_config = None if decoder_config is None else _plain(decoder_config)
        self.num_queries = num_queries
        self.image_size = image_size
        self.prompt_ids = list(prompt_ids)
        self.empty_prompt_ids = list(empty_prompt_ids)
        self.denoising_loss = denoising_loss
        self.min_snr_gamma = min_snr_gamma
        self.timestep_density = timestep_density
        self.timestep_shift = timestep_shift
        self.noise_draws = noise_draws
        self.nested_queries = nested_queries
        self.context_dropout = context_dropout
        self.sample_latents = sample_latents
        self.bypass_text_encoder = bypass_text_encoder
        self.initializer_range = initializer_range
        # Each part's own config says whether it ties its embeddings.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)
        # Set last and always, so that every saved config names the code that is saved beside it.
        self.auto_map = dict(AUTO_MAP)
        self.custom_pipelines = {task: dict(options) for task, options in CUSTOM_PIPELINES.items()}
        self.check()

    def check(self):
        """Raises ValueError for a setting that cannot be. Call it again after changing a setting."""
        if self.text_encoder_config is not None and self.context_width is not None:
            raise ValueError(
                f"context_width is {self.context_width}, but there is a text encoder, which is "
                f"{self.text_encoder_config.hidden_size} wide: leave context_width out."
            )
        positions = self.positions
        if self.num_queries < 1 or (positions is not None and self.num_queries > positions):
            limit = "choose at least 1." if positions is None else f"choose between 1 and {positions}."
            owner = "" if positions is None else f", but the text encoder has {positions} positions"
            raise ValueError(f"num_queries is {self.num_queries}{owner}: {limit}")
        image = self.encoder_config.vision_config.projection_dim
        language = self.encoder_config.text_config.d_model
        if image != language:
            raise ValueError(
                f"The encoder's image tokens are {image} wide, but its language model is {language} wide: "
                f"set its vision_config.projection_dim to {language}."
            )
        if self.denoising_loss not in ("mse", "l1"):
            raise ValueError(f"denoising_loss is {self.denoising_loss!r}: choose 'mse' or 'l1'.")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma is {self.min_snr_gamma}: give a number above 0, such as 5.")
        if not 0 <= self.context_dropout <= 1:
            raise ValueError(f"context_dropout is {self.context_dropout}: it is a share, between 0 and 1.")
        if not isinstance(self.noise_draws, int) or self.noise_draws < 1:
            raise ValueError(f"noise_draws is {self.noise_draws!r}: draw at least 1 noise level for each image.")
        if self.timestep_density not in TIMESTEP_DENSITIES:
            raise ValueError(f"timestep_density is {self.timestep_density!r}: choose {', '.join(TIMESTEP_DENSITIES)}.")
        if not 0 < self.timestep_shift < float("inf"):
            raise ValueError(f"timestep_shift is {self.timestep_shift}: give a number above 0; 1 moves no timestep.")
        if self.decoder_config is None:
            return
        # Imported only now: it brings torch and diffusers along, which a captioner's config does not need.
        try:
            from .decoders_vlv import Decoder  # noqa: F401  (transformers 5.0 copies what this file names)
            from .families_vlv import build_decoder
            from .layers_vlv import device_of  # noqa: F401
        except ImportError:
            from families_vlv import build_decoder
        build_decoder(self.decoder_config).check(self)

    @property
    def caption_embeds_width(self):
        """Width E of the caption embeddings: the text encoder's, or `context_width` where there is none."""
        return self.context_width if self.text_encoder_config is None else self.text_encoder_config.hidden_size

    @property
    def positions(self):
        """How many caption embeddings the text encoder takes at most; `None` where there is none."""
        return None if self.text_encoder_config is None else self.text_encoder_config.max_position_embeddings

    def get_text_config(self, decoder=None, encoder=None):
        """
        The config that sets the sizes for vocabulary, cache and generation: the caption head's, or without a caption
        head that of Florence-2's language model.
        """
        return self.encoder_config.text_config if self.caption_config is None else self.caption_config


def _as_config(config, config_class=None):
    """A config object from a config object or its dictionary; `None` stays `None`."""
    if not isinstance(config, dict):
        return config
    config = dict(config)
    if config_class is not None:
        return config_class(**config)
    return AutoConfig.for_model(config.pop("model_type"), **config)


def _plain(value):
    """Plain dicts and lists, because a JSON round trip changes diffusers' FrozenDicts."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


if __name__ == "configuration_vlv":
    # This is the installed module, not code of a repo. AutoTokenizer reads a repo's config before the tokenizer. With
    # the class registered, it does not ask the user to trust the repo's copy of this code.
    AutoConfig.register("vlv", VLVConfig, exist_ok=True)

__all__ = ["VLVConfig"]
