"""Sample pictures with a model's captions and reconstructions. The card shows them, and the check compares them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from processing_vlv import load_image
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.images import ImageFile
from vlv.models.loading import load_autoencoder, load_captioner, read_config
from vlv.models.rebuilding import reconstruct_images, see

PIXELS = 512  # of the longer side of a sample picture


@dataclass(frozen=True)
class Sample:
    name: str
    image: Image.Image
    caption: str
    reconstruction: Image.Image | None = None  # None: the model has no decoder


def make_samples(source: str, files: Sequence[ImageFile], captioner_only: bool = False) -> list[Sample]:
    """
    Caption and rebuild pictures with the VLV `source`.

    Raises:
        OSError, ValueError: for a picture that cannot be read, or a model that cannot be loaded whole.
    """
    pictures = []
    for file in files:
        image = load_image(file.path)
        image.thumbnail((PIXELS, PIXELS))
        pictures.append((Path(file.name).stem, image))
    model, processor = load_captioner(source)
    captioner = Captioner(model, processor, Decoding(), batch_size=8)
    captions = {name: best.text for name, (best, *_) in captioner.caption_images(pictures)}
    if captioner_only or read_config(source).decoder_config is None:
        return [Sample(name, image, captions[name]) for name, image in pictures]
    model, processor = load_autoencoder(source, caption_config=None)
    seen = ((name, see(processor, image)) for name, image in pictures)
    return [
        Sample(name, image, captions[name], reconstruction)
        for name, image, reconstruction in reconstruct_images(model, seen)
    ]
