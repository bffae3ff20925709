"""The scene reader: a small classifier that reads the scene of a picture. It is independent of all caption models.

It scores reconstructions: it reads a picture from a diffusion decoder as a `Scene`, which is compared with the true
scene. It was trained on drawings of the train split, blurred, tinted and with noise, because decoded pictures are not
clean. The trained reader is bundled (see `scene_reader`); `python -m vlv.scenes.reader` trains it.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    Trainer,
    TrainingArguments,
)
from transformers.utils import ModelOutput

from vlv.scenes import WORLDS, World, compare, world
from vlv.scenes.grammar import GridScene

IGNORED = -100  # the label that cross-entropy skips


@dataclass(frozen=True)
class Lessons:
    """The settings of a world's reader and of its training data."""

    folder: str  # of the bundled reader, in the folder of checkpoints
    config: dict[str, Any] = field(default_factory=dict)
    world: dict[str, Any] = field(default_factory=dict)


LESSONS = {
    "shapes": Lessons("scene-reader"),
    "emoji": Lessons(
        "emoji-reader",
        config={
            "cell_size": 64,
            "backbone_config": {
                "embedding_size": 32,
                "hidden_sizes": [32, 64, 128, 256],
                "depths": [1, 1, 1, 1],
                "layer_type": "basic",
            },
        },
        world={"varied": 0.6},
    ),
}


class SceneReaderConfig(PreTrainedConfig):
    """The words that the reader knows, in the order of its logits, and its network.

    Args:
        world: the name of the world that it reads.
        grid: columns and rows; `places` names its cells in reading order.
        cell_size: side of a cell in pixels, after enlarging and before the network.
        attributes: the fields of an object and the words of each; the first field says what the object is. They are
            pairs, because a saved config loses the order of a mapping.
        backbone_config: the arguments of `ResNetConfig`.
    """

    model_type = "scene-reader"

    def __init__(
        self,
        world: str = "shapes",
        image_size: int = 32,
        grid: Sequence[int] = (2, 2),
        cell_size: int = 32,
        places: Sequence[str] = (),
        attributes: Sequence[tuple[str, Sequence[str]]] = (),
        backgrounds: Sequence[str] = (),
        backbone_config: dict | None = None,
        **kwargs,
    ):
        self.world = world
        self.image_size = image_size
        self.grid = list(grid)
        self.cell_size = cell_size
        self.places = list(places)
        self.attributes = [[name, list(words)] for name, words in attributes]
        self.backgrounds = list(backgrounds)
        self.backbone_config = backbone_config or {
            "embedding_size": 32,
            "hidden_sizes": [32, 64, 128],
            "depths": [1, 1, 1],
            "layer_type": "basic",
        }
        super().__init__(**kwargs)

    @classmethod
    def of(cls, world: World, **kwargs) -> "SceneReaderConfig":
        """The config of a reader for a world."""
        fields = dict.fromkeys((world.subject, *world.words))
        attributes = [(name, world.words[name]) for name in fields if name != "place"]
        return cls(
            world=world.name,
            image_size=world.image_size,
            grid=(world.columns, world.rows),
            places=world.places,
            attributes=attributes,
            backgrounds=tuple(world.backgrounds),
            **kwargs,
        )


@dataclass
class SceneReaderOutput(ModelOutput):
    """
    Args:
        loss: the sum of the mean cross-entropies of all logits, if labels are given.
        attribute_logits: for each of the config's attributes, in their order, (B, places, words). The first attribute
            has one more logit at the beginning, for no object.
        background_logits: (B, backgrounds).
    """

    loss: Tensor | None = None
    attribute_logits: tuple[Tensor, ...] | None = None
    background_logits: Tensor | None = None


class SceneReader(PreTrainedModel):
    """A ResNet. Its last map is pooled to the grid of places, and one head, shared by all places, reads each cell."""

    config_class = SceneReaderConfig
    base_model_prefix = "reader"
    main_input_name = "pixel_values"

    def __init__(self, config: SceneReaderConfig):
        super().__init__(config)
        backbone_config = ResNetConfig(**config.backbone_config)
        width = backbone_config.hidden_sizes[-1]
        self.backbone = ResNetModel(backbone_config)
        # A ResNet shrinks the image fourfold in its first layers, and small objects are only a few pixels wide, so
        # the image is enlarged first. A power of 2 also makes the last map an exact multiple of the grid.
        columns, rows = config.grid
        self.enlarge = nn.Upsample((config.cell_size * rows, config.cell_size * columns), mode="bilinear")
        self.pool = nn.AdaptiveAvgPool2d((rows, columns))
        first, *others = (len(words) for _, words in config.attributes)
        self.object_sizes = [1 + first, *others]
        self.object_head = nn.Linear(width, sum(self.object_sizes))
        self.background_head = nn.Linear(width, len(config.backgrounds))
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, background_labels: Tensor | None = None
    ) -> SceneReaderOutput:
        """
        Args:
            pixel_values: (B, 3, image_size, image_size), float, in -1..1.
            labels: (B, places, attributes), int. The first attribute is 0 if there is no object; -100 is ignored.
            background_labels: (B,), int; needed if labels are given.

        Raises:
            ValueError: for pixel_values of another shape.
        """
        expected = (3, self.config.image_size, self.config.image_size)
        if pixel_values.shape[1:] != expected:
            raise ValueError(
                f"pixel_values must be (batch, {', '.join(map(str, expected))}), not {tuple(pixel_values.shape)}."
            )
        features = self.backbone(self.enlarge(pixel_values)).last_hidden_state
        cells = self.pool(features).flatten(2).transpose(1, 2)
        objects, background = self.object_head(cells).split(self.object_sizes, -1), self.background_head(cells.mean(1))
        loss = None
        if labels is not None:
            pairs = zip((*objects, background), (*labels.unbind(-1), background_labels), strict=True)
            loss = sum(F.cross_entropy(logits.flatten(0, -2), target.flatten()) for logits, target in pairs)
        return SceneReaderOutput(loss, objects, background)

    @torch.inference_mode()
    def read(self, images: Sequence[Image.Image], batch_size: int = 256) -> list[GridScene]:
        """The most likely scene of each PIL image, of any mode and size; images are resized to the reader's size."""
        self.eval()
        size = (self.config.image_size,) * 2
        scenes = []
        for start in range(0, len(images), batch_size):
            batch = [image.convert("RGB") for image in images[start : start + batch_size]]
            batch = [image if image.size == size else image.resize(size, Image.Resampling.BICUBIC) for image in batch]
            pixels = torch.stack([to_pixels(image) for image in batch])
            output = self(pixels.to(self.device, self.dtype))
            objects = torch.stack([logits.argmax(-1) for logits in output.attribute_logits], -1).tolist()
            backgrounds = output.background_logits.argmax(-1).tolist()
            scenes += [self._scene(*choices) for choices in zip(objects, backgrounds, strict=True)]
        return scenes

    def _scene(self, objects: list[list[int]], background: int) -> GridScene:
        scene_type, found = world(self.config.world).scene_type, []
        for (subject, *others), place in zip(objects, self.config.places, strict=True):
            if subject > 0:
                names = zip(self.config.attributes, (subject - 1, *others), strict=True)
                fields = {name: words[choice] for (name, words), choice in names}
                found.append(scene_type.objects_are(**fields, place=place))
        return scene_type(tuple(found), self.config.backgrounds[background])


@cache
def scene_reader(world_name: str = "shapes") -> SceneReader:
    """The trained reader of a world, which ships with this package, in fp32."""
    folder = Path(__file__).parents[1] / "checkpoints" / LESSONS[world_name].folder
    return SceneReader.from_pretrained(folder, dtype=torch.float32).eval()


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) float32 in -1..1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


# --- training ---


def degrade(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Add random blur, tint and noise to a drawing, as a diffusion decoder might."""
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8)))
    pixels = np.asarray(image) * rng.uniform(0.96, 1.04, size=3) + rng.uniform(-6, 6, size=3)
    for cells, strength in ((image.height, 10), (8, 8)):  # fine noise, and noise of the size of a latent's cells
        noise = rng.normal(128, rng.uniform(0, strength), size=(cells, cells, 3)).clip(0, 255).astype(np.uint8)
        pixels += np.asarray(Image.fromarray(noise).resize(image.size, Image.Resampling.BICUBIC)) - 128.0
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


class ReadingLessons(Dataset):
    """Drawings of the train split, most of them degraded, with the labels of `SceneReader.forward`.

    A third of them have any number of objects that fits the grid, because a decoder may draw scenes of no split.
    """

    def __init__(self, config: SceneReaderConfig, drawn: World, num: int, seed: int):
        self.config, self.world, self.num, self.seed = config, drawn, num, seed

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((index, self.seed))
        crowd = int(rng.integers(len(self.config.places) + 1)) if rng.random() < 1 / 3 else None
        image, scene = self.world.sample_picture("train", index, self.seed, crowd)
        if rng.random() < 0.8:
            image = degrade(image, rng)
        labels = torch.full((len(self.config.places), len(self.config.attributes)), IGNORED)
        labels[:, 0] = 0
        for item in scene.objects:
            label = [words.index(getattr(item, name)) for name, words in self.config.attributes]
            label[0] += 1
            labels[self.config.places.index(item.place)] = torch.tensor(label)
        background = torch.tensor(self.config.backgrounds.index(scene.background))
        return {"pixel_values": to_pixels(image), "labels": labels, "background_labels": background}


def measure(reader: SceneReader, split: str, num: int = 1000, degraded: bool = False) -> dict[str, int]:
    """Read `num` drawings of a split. Returns the summed counts of `vlv.scenes.compare`."""
    drawn = world(reader.config.world)
    pictures = [drawn.sample_picture(split, index) for index in range(num)]
    images = [degrade(image, np.random.default_rng(i)) if degraded else image for i, (image, _) in enumerate(pictures)]
    total = Counter()
    for predicted, (_, truth) in zip(reader.read(images), pictures, strict=True):
        total.update(compare(predicted, truth))
    return dict(total)


@dataclass
class ReaderArguments:
    world: str = field(default="shapes", metadata={"help": f"Which world to read: {', '.join(WORLDS)}."})


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        (ReaderArguments, TrainingArguments),
        prog="python -m vlv.scenes.reader",
        description="Train the scene reader from random weights on drawn scenes, and measure it on unseen scenes. It "
        "takes every argument of transformers' TrainingArguments and writes the reader and its accuracy.json to "
        "--output_dir.",
    )
    parser.set_defaults(
        output_dir="outputs/scene-reader",
        max_steps=1500,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.01,
        logging_steps=50,
        save_steps=500,
        save_total_limit=1,
        dataloader_num_workers=1,
        dataloader_pin_memory=False,
        report_to="none",
    )
    which, arguments = parser.parse_args_into_dataclasses(argv)
    transformers.set_seed(arguments.seed)
    drawn = world(which.world, **LESSONS[which.world].world)
    config = SceneReaderConfig.of(drawn, **LESSONS[which.world].config)
    reader = SceneReader(config)
    lessons = ReadingLessons(config, drawn, arguments.max_steps * arguments.train_batch_size, arguments.seed)
    Trainer(reader, arguments, train_dataset=lessons).train(resume_from_checkpoint=arguments.resume_from_checkpoint)

    reader.half().save_pretrained(arguments.output_dir)
    reader = SceneReader.from_pretrained(arguments.output_dir, dtype=torch.float32)
    accuracy = {split: measure(reader, split) for split in drawn.unseen}
    accuracy["test, degraded"] = measure(reader, "test", degraded=True)
    text = json.dumps(accuracy, indent=2)
    Path(arguments.output_dir, "accuracy.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
