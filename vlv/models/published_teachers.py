"""
The published text-to-image models by their Hub ids, as `decoder_config`: what `vlv info` counts without a download.

Only what differs from the defaults of diffusers' classes, and only what decides sizes. `from_components` reads the
models' own configs.
"""

from typing import Any

KL_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
}
KL_VAE_16 = KL_VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
STABLE_DIFFUSION_3_5_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
SDXL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
SANA_VAE = {
    "_class_name": "AutoencoderDC",
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}


def _sana(heads: int, layers: int, cross_heads: int, cross_width: int) -> dict[str, Any]:
    return {
        "_class_name": "SanaTransformer2DModel",
        "sample_size": 32,
        "patch_size": 1,
        "in_channels": 32,
        "out_channels": 32,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": 32,
        "num_cross_attention_heads": cross_heads,
        "cross_attention_head_dim": cross_width // cross_heads,
        "cross_attention_dim": cross_width,
        "caption_channels": 2304,
        "mlp_ratio": 2.5,
    }


def _sana_pipeline(transformer: dict[str, Any]) -> dict[str, Any]:
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
    }
    return {"_class_name": "SanaPipeline", "transformer": transformer, "vae": SANA_VAE, "scheduler": scheduler}


TEACHERS: dict[str, dict[str, Any]] = {
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": SDXL_UNET,
        "vae": KL_VAE | {"scaling_factor": 0.13025},
        "scheduler": {
            "_class_name": "EulerDiscreteScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
        },
    },
    "stabilityai/stable-diffusion-3.5-medium": {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": STABLE_DIFFUSION_3_5_MEDIUM,
        "vae": KL_VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        "scheduler": FLOW | {"shift": 3.0},
    },
    "Efficient-Large-Model/Sana_600M_512px_diffusers": _sana_pipeline(_sana(36, 28, 16, 1152) | {"sample_size": 16}),
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": _sana_pipeline(_sana(70, 20, 20, 2240) | {"sample_size": 16}),
    "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": {
        "_class_name": "PixArtSigmaPipeline",
        "transformer": {
            "_class_name": "PixArtTransformer2DModel",
            "sample_size": 64,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "use_additional_conditions": False,
        },
        "vae": KL_VAE | {"scaling_factor": 0.13025},
        "scheduler": {
            "_class_name": "DPMSolverMultistepScheduler",
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "prediction_type": "epsilon",
        },
    },
    "Alpha-VLLM/Lumina-Image-2.0": {
        "_class_name": "Lumina2Pipeline",
        "transformer": {
            "_class_name": "Lumina2Transformer2DModel",
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "hidden_size": 2304,
            "num_layers": 26,
            "num_refiner_layers": 2,
            "num_attention_heads": 24,
            "num_kv_heads": 8,
            "cap_feat_dim": 2304,
            "axes_dim_rope": [32, 32, 32],
            "axes_lens": [300, 512, 512],
        },
        "vae": KL_VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        "scheduler": FLOW | {"shift": 6.0},
    },
    "Tongyi-MAI/Z-Image": {
        "_class_name": "ZImagePipeline",
        "transformer": {
            "_class_name": "ZImageTransformer2DModel",
            "all_patch_size": [2],
            "all_f_patch_size": [1],
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "cap_feat_dim": 2560,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
        },
        "vae": KL_VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        "scheduler": FLOW | {"shift": 6.0},
    },
    "black-forest-labs/FLUX.2-klein-base-4B": {
        "_class_name": "Flux2KleinPipeline",
        "transformer": {
            "_class_name": "Flux2Transformer2DModel",
            "patch_size": 1,
            "in_channels": 128,
            "num_layers": 5,
            "num_single_layers": 20,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        "vae": KL_VAE
        | {
            "_class_name": "AutoencoderKLFlux2",
            "latent_channels": 32,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
        },
        "scheduler": FLOW | {"use_dynamic_shifting": True},
    },
}
