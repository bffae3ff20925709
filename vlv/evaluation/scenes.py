"""Scores on drawn scenes, where every fact is known: captions are parsed, pictures are read by the scene reader.

Everything that can be drawn is drawn by the same sampler from caption embeddings, so that only their source differs:
the image (that is the model), the true caption's word embeddings (the teacher: a ceiling), the empty prompt's or
another image's (floors).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.evaluation.results import Measurement
from vlv.reader import scene_reader
from vlv.scenes import Scene, compare, parse_caption

Pictures = Sequence[tuple[Image.Image, Scene]]


@dataclass
class SceneScorer:
    """
    Scores a VLV on pictures with known scenes.

    Args:
        model, processor: the VLV, on its device.
        batch_size: pictures at once.
        num_inference_steps, guidance_scale: of the sampler, for everything drawn.
        seed: of the noise; picture i starts from the noise of `seed + i`, whatever the batch.
    """

    model: VLVModel
    processor: VLVProcessor
    batch_size: int = 50
    num_inference_steps: int = 20
    guidance_scale: float = 2.0
    seed: int = 0

    def captions(self, pictures: Pictures, name: str) -> dict[str, Measurement]:
        """Greedy captions of the pictures: exactly right, objects and backgrounds right, ended by themselves."""
        counts, ended = [], []
        end = self.model.generation_config.eos_token_id
        ends = torch.tensor(end if isinstance(end, list) else [end])
        for batch in self._batches(pictures, f"Captioning {name}"):
            embeds = self._encode([image for image, _ in batch])
            ids = self.model.generate(caption_embeds=embeds, do_sample=False, num_beams=1).cpu()
            ended += torch.isin(ids, ends).any(1).tolist()
            for caption, (_, truth) in zip(self.processor.batch_decode(ids), batch, strict=True):
                counts.append(compare(_parsed(caption), truth))
        scores = _shares(counts, f"captions/{name}", ("exact", "objects_right", "background_right"))
        return scores | {f"captions/{name}/ended": Measurement.share(np.array(ended))}

    def reconstructions(self, pictures: Pictures, name: str) -> dict[str, Measurement]:
        """Pictures rebuilt from nothing but their caption embeddings."""
        return self._drawn(
            pictures, f"reconstruction/{name}", lambda batch: self._encode([image for image, _ in batch])
        )

    def ceilings(self, pictures: Pictures, name: str) -> dict[str, Measurement]:
        """What no reconstruction can be expected to pass: reader alone, VAE alone, and the teacher."""
        return {
            **self._read(pictures, f"reader on drawings/{name}", lambda batch: [image for image, _ in batch]),
            **self._read(
                pictures, f"VAE alone/{name}", lambda batch: self._through_vae([image for image, _ in batch])
            ),
            **self._drawn(
                pictures,
                f"teacher from true captions/{name}",
                lambda batch: self._embed_text([truth.caption for _, truth in batch]),
            ),
        }

    def floors(self, pictures: Pictures, name: str) -> dict[str, Measurement]:
        """What chance alone gets right: pictures drawn from the empty prompt, and from another image's embeddings."""
        others = [image for image, _ in (*pictures[1:], pictures[0])]
        partner = {id(image): other for (image, _), other in zip(pictures, others, strict=True)}
        return {
            **self._drawn(pictures, f"empty context/{name}", lambda batch: self._embed_text([""] * len(batch))),
            **self._drawn(
                pictures,
                f"another image's context/{name}",
                lambda batch: self._encode([partner[id(image)] for image, _ in batch]),
            ),
        }

    def _drawn(self, pictures, name, embed: Callable) -> dict[str, Measurement]:
        drawn = 0

        def draw(batch):
            nonlocal drawn
            generators = [torch.Generator().manual_seed(self.seed + drawn + i) for i in range(len(batch))]
            drawn += len(batch)
            return self.model.reconstruct(
                caption_embeds=embed(batch),
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                generator=generators,
            )

        return self._read(pictures, name, draw)

    def _read(self, pictures, name, paint: Callable) -> dict[str, Measurement]:
        reader, counts = scene_reader().to(self.model.device), []
        for batch in self._batches(pictures, name):
            scenes = reader.read(paint(batch))
            counts += [compare(scene, truth) for scene, (_, truth) in zip(scenes, batch, strict=True)]
        return _shares(counts, name, ("objects_right", "background_right"))

    def _batches(self, pictures, description) -> Iterator[Pictures]:
        starts = range(0, len(pictures), self.batch_size)
        with torch.inference_mode():
            for start in tqdm(starts, desc=description, unit="batch", leave=False):
                yield pictures[start : start + self.batch_size]

    def _encode(self, images):
        return self.model.encode(self.processor(images=images)["pixel_values"])

    def _through_vae(self, images):
        pixels = self.processor(images=images, return_decoder_pixel_values=True)["decoder_pixel_values"]
        decoded = self.model.decode_latents(self.model.encode_latents(pixels, sample=False)).float().cpu()
        values = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(value) for value in values]

    def _embed_text(self, captions):
        """The captions' word embeddings (B, Q, E): what the teacher was trained to read."""
        tokenizer = self.processor.decoder_tokenizer
        if tokenizer is None:
            raise ValueError(
                "The checkpoint lacks its decoder's tokenizer (folder decoder_tokenizer), which the ceiling needs."
            )
        positions = self.model.config.text_encoder_config.max_position_embeddings
        ids = tokenizer(
            captions, padding="max_length", max_length=positions, truncation=True, return_tensors="pt"
        ).input_ids
        return self.model.text_encoder.embeddings.token_embedding(ids.to(self.model.device))


def mirror(pictures: Pictures) -> Pictures:
    """The pictures and their scenes, mirrored: right answers mirror too."""
    return [(ImageOps.mirror(image), scene.mirrored()) for image, scene in pictures]


def _parsed(caption):
    try:
        return parse_caption(caption)
    except ValueError:
        return None


def _shares(counts, name, wanted) -> dict[str, Measurement]:
    total = {"objects_right": "objects"}
    column = {key: np.array([count[key] for count in counts]) for key in (*wanted, "objects", "scenes")}
    return {f"{name}/{key}": Measurement.share(column[key], column[total.get(key, "scenes")]) for key in wanted}
