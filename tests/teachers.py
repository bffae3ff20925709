"""Tiny random teachers of diffusers' real classes, and what their own pipelines ask of their denoisers."""

import inspect

import diffusers
import pytest
import tiny
import torch
import transformers
from diffusers.configuration_utils import FrozenDict

from families_vlv import build_decoder
from modeling_vlv import VLVModel

KL = {
    "_class_name": "AutoencoderKL",
    "sample_size": 32,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
KL16 = KL | {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
KL8 = KL16 | {  # a factor of 8, which Lumina2's pipeline takes for granted
    "block_out_channels": [8] * 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
NOISE = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
# `decoder_config` of each family. The width is what `text_encoders` of the same family gives.
TEACHERS = {
    "SD 1 (epsilon)": {
        "unet": UNET | {"cross_attention_dim": 24},
        "vae": KL | {"latent_channels": 4, "scaling_factor": 0.18215},
        "scheduler": NOISE | {"prediction_type": "epsilon"},
    },
    "SD 2 (velocity)": {
        "_class_name": "StableDiffusionPipeline",
        "unet": UNET | {"cross_attention_dim": 24},
        "vae": KL | {"latent_channels": 4, "scaling_factor": 0.18215},
        "scheduler": NOISE | {"prediction_type": "v_prediction"},
    },
    "SDXL": {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": UNET
        | {
            "cross_attention_dim": 48,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "transformer_layers_per_block": [1, 2],
            "projection_class_embeddings_input_dim": 8 * 6 + 24,
            "use_linear_projection": True,
        },
        "vae": KL
        | {
            "latent_channels": 4,
            "scaling_factor": 0.13025,
            "latents_mean": [0.1, -0.2, 0.3, 0.4],
            "latents_std": [1.5, 2.0, 0.5, 1.0],
        },
        "scheduler": NOISE
        | {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "timestep_spacing": "leading"},
    },
    "SD 3.5": {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 48,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 48,
            "pos_embed_max_size": 24,
            "dual_attention_layers": [0],
            "qk_norm": "rms_norm",
        },
        "vae": KL16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        "scheduler": FLOW | {"shift": 3.0},
    },
    "Lumina2": {
        "_class_name": "Lumina2Pipeline",
        "transformer": {
            "_class_name": "Lumina2Transformer2DModel",
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 16,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": [4, 2, 2],
            "axes_lens": [512, 128, 128],
            "cap_feat_dim": 32,
        },
        "vae": KL8,
        "scheduler": FLOW | {"shift": 6.0},
    },
    "Z-Image": {
        "_class_name": "ZImagePipeline",
        "transformer": {
            "_class_name": "ZImageTransformer2DModel",
            "all_patch_size": [2],
            "all_f_patch_size": [1],
            "in_channels": 16,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "qk_norm": True,
            "cap_feat_dim": 32,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        "vae": KL16,
        "scheduler": FLOW | {"shift": 6.0},
    },
    "Sana": {
        "_class_name": "SanaPipeline",
        "transformer": {
            "_class_name": "SanaTransformer2DModel",
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 32,
            "sample_size": 16,
            "timestep_scale": 0.5,
        },
        "vae": {
            "_class_name": "AutoencoderDC",
            "in_channels": 3,
            "latent_channels": 4,
            "attention_head_dim": 2,
            "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
            "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
            "encoder_block_out_channels": [8, 8],
            "decoder_block_out_channels": [8, 8],
            "encoder_qkv_multiscales": [[], [5]],
            "decoder_qkv_multiscales": [[], [5]],
            "encoder_layers_per_block": [1, 1],
            "decoder_layers_per_block": [1, 1],
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
            "decoder_norm_types": "rms_norm",
            "decoder_act_fns": "silu",
            "scaling_factor": 0.41407,
        },
        "scheduler": {
            "_class_name": "DPMSolverMultistepScheduler",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
            "num_train_timesteps": 1000,
        },
    },
    "PixArt-Sigma": {
        "_class_name": "PixArtSigmaPipeline",
        "transformer": {
            "_class_name": "PixArtTransformer2DModel",
            "sample_size": 16,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": 32,
            "in_channels": 4,
            "cross_attention_dim": 32,
            "out_channels": 8,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "use_additional_conditions": False,
        },
        "vae": KL | {"latent_channels": 4, "scaling_factor": 0.13025},
        "scheduler": {
            "_class_name": "DPMSolverMultistepScheduler",
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
        },
    },
    "FLUX.2 klein": {
        "_class_name": "Flux2KleinPipeline",
        "transformer": {
            "_class_name": "Flux2Transformer2DModel",
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 96,
            "timestep_guidance_channels": 32,
            "axes_dims_rope": [4, 4, 4, 4],
            "guidance_embeds": False,
        },
        "vae": KL
        | {
            "_class_name": "AutoencoderKLFlux2",
            "latent_channels": 4,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "scheduler": FLOW | {"use_dynamic_shifting": True},
    },
    "Qwen-Image": {
        "_class_name": "QwenImagePipeline",
        "transformer": {
            "_class_name": "QwenImageTransformer2DModel",
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 32,
            "guidance_embeds": False,
            "axes_dims_rope": [8, 4, 4],
        },
        "vae": {
            "_class_name": "AutoencoderKLQwenImage",
            "base_dim": 24,
            "z_dim": 4,
            "dim_mult": [1, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [False],
            "latents_mean": [0.1, -0.2, 0.3, 0.0],
            "latents_std": [1.5, 2.0, 0.7, 1.0],
        },
        "scheduler": FLOW
        | {
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 0.9,
            "base_image_seq_len": 256,
            "max_image_seq_len": 8192,
            "shift_terminal": 0.02,
        },
    },
}
EMPTY = 7  # embeddings that stand for the empty prompt


def config(family, **settings):
    """A `VLVConfig` with the tiny teacher of a family."""
    teacher = TEACHERS[family]
    settings = {"decoder_config": teacher, "num_queries": 10, "image_size": 32, **settings}
    decoder = build_decoder(teacher)
    if decoder.reads_text_encoder:
        return tiny.config(**settings)
    settings["decoder_config"] = teacher | {"empty_prompt_length": EMPTY}
    return tiny.config(text_encoder_config=None, context_width=decoder.context_width, empty_prompt_ids=(), **settings)


def model(family, seed=0, **settings):
    """A random model: every weight matters, also those of output layers that libraries initialise to zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlv = tiny.randomise(VLVModel(config(family, **settings)), seed)
    generator = torch.Generator().manual_seed(seed)
    for name in vlv.empty_buffers:
        getattr(vlv, name).copy_(torch.randn(getattr(vlv, name).shape, generator=generator))
    if hasattr(vlv.vae, "bn"):
        vlv.vae.bn.running_mean.copy_(0.1 * torch.randn(vlv.vae.bn.running_mean.shape, generator=generator))
        vlv.vae.bn.running_var.copy_(0.5 + torch.rand(vlv.vae.bn.running_var.shape, generator=generator))
    if vlv.caption_head is not None:
        tiny.randomise_caption_head(vlv.caption_head, seed)
    return vlv


class Recorder:
    """In a scheduler's place: its one step is at the wanted times, and records what the pipeline makes of it."""

    order, init_noise_sigma, sigma_max = 1, 1.0, 1.0

    def __init__(self, scheduler, times):
        self.config, self.times, self.predictions = FrozenDict({**scheduler.config}), times, []

    def set_timesteps(self, *args, sigmas=None, mu=None, device=None, **kwargs):
        self.timesteps = self.times[None]  # one step, of a time for each image

    def set_begin_index(self, index):
        pass

    def scale_model_input(self, sample, timestep):
        return sample

    def step(self, prediction, timestep, sample, **kwargs):
        self.predictions.append(prediction)
        return (sample,)


def pipelines_prediction(vlv, latents, times, arguments, **call):
    """What diffusers' own pipeline makes of its denoiser's answer, with the graph: it is wrapped in `no_grad`."""
    pipeline = vlv.to_pipeline()
    recorder = Recorder(pipeline.scheduler, times)
    pipeline.register_modules(scheduler=None)
    pipeline.scheduler = recorder
    pipeline.set_progress_bar_config(disable=True)
    run = inspect.unwrap(type(pipeline).__call__)
    run(pipeline, **arguments, latents=latents, num_inference_steps=1, output_type="latent", **call)
    return recorder.predictions[0]


def available(family):
    """Whether the installed diffusers has the family."""
    return hasattr(diffusers, TEACHERS[family].get("_class_name", "StableDiffusionPipeline"))


FAMILIES = [
    pytest.param(name, marks=pytest.mark.skipif(not available(name), reason="the installed diffusers lacks it"))
    for name in TEACHERS
]
every_family = pytest.mark.parametrize("family", FAMILIES)


# ---- pipelines in folders --------------------------------------------------------------------------------------


def clip(width, projected):
    tokenizer = tiny.decoder_tokenizer()
    settings = tiny.text_encoder_config().to_dict()
    settings |= {"hidden_size": width, "projection_dim": width, "bos_token_id": tokenizer.bos_token_id}
    model_class = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return model_class(transformers.CLIPTextConfig(**settings)), tokenizer


def t5(width):
    tokenizer = tiny.caption_tokenizer()
    settings = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    return transformers.T5EncoderModel(transformers.T5Config(**settings)), tokenizer


def language_model(model_class, config_class, width=32, layers=2, **settings):
    tokenizer = tiny.caption_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer)}
    return model_class(config_class(**sizes, **settings)), tokenizer


def text_encoders(family):
    """The components that read words, by diffusers' names."""
    if family.startswith("SD "):
        kinds = {"": clip(24, False)}
    if family == "SDXL":
        kinds = {"": clip(24, False), "_2": clip(24, True)}
    if family == "SD 3.5":
        kinds = {"": clip(24, True), "_2": clip(24, True), "_3": t5(48)}
    if family in ("Lumina2", "Sana"):
        kinds = {"": language_model(transformers.Gemma2Model, transformers.Gemma2Config)}
    if family == "PixArt-Sigma":
        kinds = {"": t5(32)}
    if family == "Z-Image":
        kinds = {"": language_model(transformers.Qwen3Model, transformers.Qwen3Config)}
    if family == "FLUX.2 klein":  # it reads three layers, the last of them the 27th
        kinds = {"": language_model(transformers.Qwen3ForCausalLM, transformers.Qwen3Config, layers=28)}
    if family == "Qwen-Image":
        config_class = transformers.Qwen2_5_VLConfig
        model, tokenizer = language_model(transformers.Qwen2Model, transformers.Qwen2Config)
        text = model.config.to_dict() | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
        text.pop("model_type")
        config = config_class(text_config=text | {"head_dim": 16}, vision_config=vision)
        kinds = {"": (transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer)}
    names = {}
    for suffix, (encoder, tokenizer) in kinds.items():
        names |= {f"text_encoder{suffix}": tiny.randomise(encoder), f"tokenizer{suffix}": tokenizer}
    return names


def save_pipeline(family, folder, **changes):
    """A whole text-to-image pipeline of a family, as a user finds it; `changes` are other components."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = build_decoder(TEACHERS[family])
        parts = {name: tiny.randomise(part) for name, part in decoder.build().items()}
        parts |= text_encoders(family) | changes
    pipeline = decoder.make_pipeline(**parts)
    settings = TEACHERS[family]["scheduler"]
    pipeline.register_modules(scheduler=getattr(diffusers, settings["_class_name"]).from_config(settings))
    pipeline.save_pretrained(folder)
    return folder
