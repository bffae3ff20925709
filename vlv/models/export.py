"""Writes each part of a VLV in the format of its own library, for `vlv export`."""

import copy
import json
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel, Florence2ForConditionalGeneration

from components_vlv import module_weights
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor

ADAPTERS = ("queries", "projection", "prefix_projection")  # the parts that only a VLV has


def export_parts(model: VLVModel, processor: VLVProcessor, folder: str | Path) -> list[str]:
    """
    Writes the parts of a model, and returns the names of their folders.

    - `encoder/`: a `Florence2ForConditionalGeneration` with its tokenizer and image settings;
    - `decoder/`: the teacher as a diffusers pipeline. A family whose text encoders the model does not hold is loaded
      with these named as `None`. Where the model has no denoiser and VAE: only the text encoder, if there is one;
    - `caption_head/`: the language model with its tokenizer, where there is one;
    - `adapters/`: `adapters.safetensors` with the queries and projections, named as in `VLVModel`.

    `VLVModel.from_components` puts the first three together again.
    """
    folder = Path(folder)
    _export_encoder(model, processor, folder / "encoder")
    _export_decoder(model, processor, folder / "decoder")
    if model.caption_head is not None:
        model.caption_head.generation_config = model.generation_config
        model.caption_head.save_pretrained(folder / "caption_head")
        processor.tokenizer.save_pretrained(folder / "caption_head")
    (folder / "adapters").mkdir(parents=True)
    adapters = {name: weight for name, weight in model.state_dict().items() if name.split(".")[0] in ADAPTERS}
    save_file(adapters, folder / "adapters" / "adapters.safetensors", metadata={"format": "pt"})
    return sorted(path.name for path in folder.iterdir())


def _export_encoder(model, processor, folder):
    weights = {f"model.{name}": weight for name, weight in module_weights(model.encoder).items()}
    config = copy.deepcopy(model.config.encoder_config)
    config.tie_word_embeddings = True  # the language head is the word embeddings; not all releases take it for granted
    florence = Florence2ForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=model.encoder.dtype
    )
    florence.save_pretrained(folder)
    if processor.encoder_tokenizer is not None:
        processor.encoder_tokenizer.save_pretrained(folder)
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": processor.image_height, "width": processor.image_width},
        "resample": 3,  # bicubic
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2))


def _export_decoder(model, processor, folder):
    text = {}
    if model.text_encoder is not None:
        with torch.device("meta"):
            clip = CLIPTextModel(model.config.text_encoder_config)
        inner = getattr(clip, "text_model", clip)  # the wrapper is gone in recent releases
        for name, part in model.text_encoder.named_children():
            setattr(inner, name, part)
        text = {"text_encoder": clip, "tokenizer": processor.decoder_tokenizer}
    if model.teacher is None:
        for name, part in text.items():
            if part is not None:
                part.save_pretrained(folder / name)
        return
    scheduler = model.config.decoder_config["scheduler"]
    scheduler = getattr(diffusers, scheduler.get("_class_name", "DDIMScheduler")).from_config(scheduler)
    model.to_pipeline(scheduler, **text).save_pretrained(folder)
