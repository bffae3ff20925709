"""Scores on drawn scenes, whose content is known: captions are parsed, and the scene reader reads pictures.

The same sampler draws all pictures from caption embeddings. Only the source of the embeddings differs: the image (the
model), the word embeddings of the true caption (the teacher: a ceiling), the empty prompt or another image (floors).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.captioning.captioner import Caption, Captioner
from vlv.captioning.settings import Decoding
from vlv.evaluation.pictures import draw, embed_captions, encode_images
from vlv.evaluation.results import Measurement
from vlv.scenes import WORLD, World, compare
from vlv.scenes.grammar import GridScene
from vlv.scenes.reader import scene_reader

Pictures = Sequence[tuple[Image.Image, GridScene]]

# The counts of `vlv.scenes.compare`, of scenes and of objects. A place is right if any object is there.
OF_SCENES = ("exact", "background_right")
MAIN_SCORES = ("objects_right", "background_right")  # of ceilings and floors


def scores_of(world: World) -> tuple[str, ...]:
    """All scores of a world. The score of what an object is comes first."""
    fields = dict.fromkeys((world.subject, *world.words))
    return ("exact", "objects_right", *(f"{name}_right" for name in fields), "background_right")


@dataclass
class SceneScorer:
    """
    Scores a VLV on pictures with known scenes.

    Args:
        model, processor: the VLV, on its device.
        world: the world of the scenes.
        batch_size: pictures at once.
        num_inference_steps, guidance_scale: of the sampler, for all pictures.
        seed: of the noise. Picture i starts from the noise of `seed + i`, for any batch size.
    """

    model: VLVModel
    processor: VLVProcessor
    world: World = WORLD
    batch_size: int = 50
    num_inference_steps: int = 8
    guidance_scale: float = 2.0
    seed: int = 0

    def captions(self, pictures: Pictures, name: str) -> dict[str, Measurement]:
        """Scores of parsed greedy captions of the pictures, and the share of captions that ended by themselves."""
        captioner = Captioner(self.model, self.processor, Decoding(), self.batch_size)
        images = ((str(number), image) for number, (image, _) in enumerate(pictures))
        captions = (best for _, (best, *_) in captioner.caption_images(images))
        return score_captions(_progress(captions, f"Captioning {name}", pictures), pictures, name, self.world)

    def reconstructions(self, pictures: Pictures, name: str) -> dict[str, Measurement]:
        """Scores of pictures that are rebuilt from their caption embeddings."""
        painted = self._draw(lambda batch: self._encode([image for image, _ in batch]), pictures)
        return self._read(pictures, f"reconstruction/{name}", painted, scores_of(self.world))

    def drawings(self, pictures: Pictures, name: str) -> dict[str, Measurement]:
        """Scores of the scene reader on the pictures themselves."""
        images = (image for image, _ in pictures)
        return self._read(pictures, f"reader on drawings/{name}", images, scores_of(self.world))

    def ceilings(self, pictures: Pictures, name: str) -> dict[str, Measurement]:
        """Ceilings that no reconstruction is expected to exceed: the reader alone, the VAE alone, and the teacher."""
        ceilings = {
            **self.drawings(pictures, name),
            **self._read(pictures, f"VAE alone/{name}", self._through_vae(pictures)),
        }
        if self.model.text_encoder is None:  # the teacher reads no captions here
            return ceilings
        taught = self._draw(
            lambda batch: embed_captions(self.model, self.processor, [truth.caption for _, truth in batch]), pictures
        )
        return ceilings | self._read(pictures, f"teacher from true captions/{name}", taught)

    def floors(self, pictures: Pictures, name: str) -> dict[str, Measurement]:
        """Floors, which are right only by chance: pictures from the empty prompt, and from another image, if any."""
        floors = self._read(pictures, f"empty context/{name}", self._draw(self._nothing, pictures))
        if len(pictures) == 1:
            return floors
        from_another = self._draw(
            lambda batch: self._encode([image for image, _ in batch]), [*pictures[1:], pictures[0]]
        )
        return floors | self._read(pictures, f"another image's context/{name}", from_another)

    def _draw(self, embed: Callable[[Pictures], torch.Tensor], pictures: Pictures) -> Iterator[Image.Image]:
        """Pictures drawn from the caption embeddings that `embed` returns for batches of `pictures`."""

        def paint(batch, generators):
            return self.model.reconstruct(
                caption_embeds=embed(batch),
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                generator=generators,
            )

        return draw(paint, pictures, self.batch_size, self.seed)

    def _through_vae(self, pictures: Pictures) -> Iterator[Image.Image]:
        def paint(batch, _):
            images = [image for image, _ in batch]
            pixels = self.processor(images=images, return_decoder_pixel_values=True)["decoder_pixel_values"]
            decoded = self.model.decode_latents(self.model.encode_latents(pixels, sample=False))
            return VaeImageProcessor().postprocess(decoded.float(), output_type="pil")

        return draw(paint, pictures, self.batch_size)

    def _read(
        self, pictures: Pictures, name: str, painted: Iterable[Image.Image], scores: Sequence[str] = MAIN_SCORES
    ) -> dict[str, Measurement]:
        """Scores of drawn pictures: the scene reader's scenes, compared with the true scenes of `pictures`."""
        reader = scene_reader(self.world.name).to(self.model.device)
        scenes = reader.read(list(_progress(painted, name, pictures)))
        counts = [compare(scene, truth) for scene, (_, truth) in zip(scenes, pictures, strict=True)]
        return _shares(counts, name, scores)

    def _nothing(self, batch):
        if self.model.text_encoder is None:
            return self.model.empty_context().expand(len(batch), -1, -1)
        return embed_captions(self.model, self.processor, [""] * len(batch))

    def _encode(self, images):
        return encode_images(self.model, self.processor, images)


def score_captions(
    captions: Iterable[Caption], pictures: Pictures, name: str, world: World = WORLD
) -> dict[str, Measurement]:
    """Scores of the parsed captions of the pictures, and the share of captions that ended by themselves."""
    captions = list(captions)
    scenes = (_parsed(caption.text, world) for caption in captions)
    counts = [compare(scene, truth) for scene, (_, truth) in zip(scenes, pictures, strict=True)]
    ended = Measurement.share(np.array([caption.ended for caption in captions]))
    return _shares(counts, f"captions/{name}", scores_of(world)) | {f"captions/{name}/ended": ended}


def mirror(pictures: Pictures) -> Pictures:
    """The pictures and their scenes, both mirrored."""
    return [(ImageOps.mirror(image), scene.mirrored()) for image, scene in pictures]


def _parsed(caption, world):
    try:
        return world.parse_caption(caption)
    except ValueError:
        return None


def _progress(items, description, pictures):
    return tqdm(items, desc=description, total=len(pictures), unit="image", leave=False)


def _shares(counts, name, scores) -> dict[str, Measurement]:
    columns = {key: np.array([count[key] for count in counts]) for key in (*scores, "objects", "scenes")}
    return {
        f"{name}/{score}": Measurement.share(columns[score], columns["scenes" if score in OF_SCENES else "objects"])
        for score in scores
    }
