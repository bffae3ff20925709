"""Builders of the pretrained models for an evaluation. They are tiny and random, but of the real classes."""

import json
from pathlib import Path

import tiny
import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ViTConfig,
    ViTModel,
)

SIZE = 32
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def save_all(folder):
    """Saves `clip`, `features` (a ViT) and `sentences` (a BERT) into `folder`, for `from_pretrained`."""
    folder = Path(folder)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    pixels = {"image_size": SIZE, "patch_size": 8}
    letters, words = tiny.decoder_tokenizer(), tiny.encoder_tokenizer()
    text = {"vocab_size": len(letters), "max_position_embeddings": tiny.POSITIONS}
    text |= {"bos_token_id": letters.bos_token_id, "eos_token_id": letters.eos_token_id}
    clip = CLIPConfig(
        text_config=CLIPTextConfig(**layers, **text).to_dict(),
        vision_config=CLIPVisionConfig(**layers, **pixels).to_dict(),
        projection_dim=8,
    )
    models = {
        "clip": (CLIPModel(clip), letters, "CLIPImageProcessor"),
        "features": (ViTModel(ViTConfig(**layers, **pixels)), None, "ViTImageProcessor"),
        "sentences": (
            BertModel(BertConfig(**layers, vocab_size=len(words), max_position_embeddings=64)),
            words,
            None,
        ),
    }
    with torch.random.fork_rng(devices=[]):
        for name, (model, tokenizer, image_processor) in models.items():
            tiny.randomise(model, seed=1).save_pretrained(folder / name)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder / name)
            if image_processor is not None:
                settings = {"image_processor_type": image_processor, "image_mean": MEAN, "image_std": STD}
                settings |= {"do_resize": True, "size": {"height": SIZE, "width": SIZE}, "do_center_crop": False}
                (folder / name / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def pixel_values(images):
    """The images, which have the right size, normalised as by those models' processors."""
    import numpy as np

    pixels = np.stack([np.asarray(image, dtype=np.float64) for image in images]) / 255
    return torch.tensor((pixels - MEAN) / STD, dtype=torch.float32).permute(0, 3, 1, 2)
