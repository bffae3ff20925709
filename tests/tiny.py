"""Builders of a tiny VLV and of its parts. They have random weights but are of the real classes, not mocks."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BartTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from configuration_vlv import VLVConfig
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor

IMAGE_SIZE = 32  # pixels, for both encoder and decoder
POSITIONS = 12  # of the text encoder
BYTES = sorted(ByteLevel.alphabet())


# ---- tokenizers: every byte is a token ---------------------------------------------------------------------


def _vocabulary(*tokens):
    return {token: number for number, token in enumerate(tokens)}


def caption_tokenizer():
    return Qwen2Tokenizer(vocab=_vocabulary("<|endoftext|>", *BYTES), merges=[])


def encoder_tokenizer():
    tokens = _vocabulary("<s>", "<pad>", "</s>", "<unk>", "<mask>", *BYTES, "<image>")
    return BartTokenizer(vocab=tokens, merges=[], extra_special_tokens=["<image>"])


def decoder_tokenizer():
    """As in Stable Diffusion 2: it pads with "!", not with the end-of-text token."""
    tokens = _vocabulary(*BYTES, *(byte + "</w>" for byte in BYTES), "<|startoftext|>", "<|endoftext|>")
    return CLIPTokenizer(vocab=tokens, merges=[], pad_token="!", model_max_length=POSITIONS)


# ---- configurations ----------------------------------------------------------------------------------------


def encoder_config():
    """A Florence-2 with two stages. A 32x32 image becomes a 4x4 grid: 16 tokens and their mean."""
    tokenizer = encoder_tokenizer()
    return Florence2Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_config={
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [16, 32],
            "num_heads": [2, 4],
            "num_groups": [2, 4],
            "window_size": 4,
            "projection_dim": 32,
            "max_position_embeddings": 8,
        },
        text_config={
            "model_type": "bart",
            "vocab_size": len(tokenizer),
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "max_position_embeddings": 128,
        },
    )


def text_encoder_config():
    tokenizer = decoder_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def decoder_config(prediction_type="v_prediction"):
    return {
        "unet": {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "block_out_channels": [16, 32],
            "layers_per_block": 1,
            "cross_attention_dim": 24,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
        },
        "vae": {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "block_out_channels": [8, 8, 8],
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": IMAGE_SIZE,
            "scaling_factor": 0.7,
        },
        "scheduler": {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": prediction_type,
            "rescale_betas_zero_snr": prediction_type == "v_prediction",
            "timestep_spacing": "trailing" if prediction_type == "v_prediction" else "leading",
            "steps_offset": 1,
            "clip_sample": False,
            "set_alpha_to_one": prediction_type == "v_prediction",
        },
    }


def caption_config(hidden_size=40):
    tokenizer = caption_tokenizer()
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def config(prediction_type="v_prediction", **settings):
    """A `VLVConfig` in which every part is tiny. `decoder_config=None` and `caption_config=None` leave parts out."""
    settings = {
        "encoder_config": encoder_config(),
        "text_encoder_config": text_encoder_config(),
        "decoder_config": decoder_config(prediction_type),
        "caption_config": caption_config(),
        "num_queries": 10,
        "prompt_ids": encoder_tokenizer()("Describe.").input_ids,
        "empty_prompt_ids": decoder_tokenizer()("", padding="max_length").input_ids,
        **settings,
    }
    return VLVConfig(**settings)


# ---- models ------------------------------------------------------------------------------------------------


def randomise(module, seed=0, gain=1.0):
    """
    Sets large weights and uneven biases, so that every input matters. A newly initialised model gives almost the same
    result for all images, and a test on it could not fail.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:  # biases, and the weights of norms
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(gain * noise / parameter[0].numel() ** 0.5)
    return module.eval()


def randomise_caption_head(llm, seed=0):
    """Sets a higher gain, or each token would repeat itself, and makes letters likelier than other bytes."""
    randomise(llm, seed, gain=3.0)
    letters = caption_tokenizer()("abcdefghijklmnopqrstuvwxyz ").input_ids
    faint = [number for number in range(llm.config.vocab_size) if number not in letters]
    llm.get_input_embeddings().weight.data[faint] *= 0.1
    return llm


def model(model_class=VLVModel, seed=0, **settings):
    """A random model in eval mode. The same seed and settings (see `config`) give the same model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlv = randomise(model_class(config(**settings)), seed)
    if vlv.caption_head is not None:
        randomise_caption_head(vlv.caption_head, seed)
    return vlv


def processor():
    return VLVProcessor(
        caption_tokenizer(),
        image_height=IMAGE_SIZE,
        image_width=IMAGE_SIZE,
        decoder_image_size=IMAGE_SIZE,
        encoder_tokenizer=encoder_tokenizer(),
        decoder_tokenizer=decoder_tokenizer(),
    )


def save_components(folder, prediction_type="v_prediction"):
    """
    Saves the parts of a VLV into `folder`, each in the layout of its own library: `encoder/` (Florence-2), `decoder/`
    (Stable Diffusion) and `caption_head/` (an LLM).
    """
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        florence = Florence2ForConditionalGeneration(encoder_config())
        parts = decoder_config(prediction_type)
        decoder = StableDiffusionPipeline(
            vae=randomise(AutoencoderKL.from_config(parts["vae"])),
            text_encoder=randomise(CLIPTextModel(text_encoder_config())),
            tokenizer=decoder_tokenizer(),
            unet=randomise(UNet2DConditionModel.from_config(parts["unet"])),
            scheduler=DDIMScheduler.from_config(parts["scheduler"]),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        llm = Qwen2ForCausalLM(caption_config())
    randomise(florence).save_pretrained(folder / "encoder")
    encoder_tokenizer().save_pretrained(folder / "encoder")
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": size, "resample": 3}
    images |= {"do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (folder / "encoder" / "preprocessor_config.json").write_text(json.dumps(images))
    decoder.save_pretrained(folder / "decoder")
    randomise_caption_head(llm).save_pretrained(folder / "caption_head")
    caption_tokenizer().save_pretrained(folder / "caption_head")
    return folder


# ---- inputs ------------------------------------------------------------------------------------------------


def images(count=3, seed=0, size=(40, 30)):
    """Different pictures in RGB. They are coarse random mosaics, so that they differ after resizing too."""
    random = np.random.default_rng(seed)
    mosaics = random.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(mosaic).resize(size, Image.Resampling.NEAREST) for mosaic in mosaics]


def pixels(count=3, seed=0):
    """`pixel_values` (count, 3, H, W) and `decoder_pixel_values` of the same pictures."""
    inputs = processor()(images=images(count, seed), return_decoder_pixel_values=True)
    return inputs["pixel_values"], inputs["decoder_pixel_values"]
