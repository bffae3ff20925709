"""Spatial awareness: the positions of rebuilt and captioned objects, by their size and number.

The training scenes have one or two objects. Scenes with three and four show how the model handles more.
"""

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from experiments.scoring import encode, rebuild, share
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.scenes import WORLD, Scene, SceneObject, parse_caption, sample_picture
from vlv.scenes.reader import scene_reader


def run(model: VLVModel, processor: VLVProcessor, num: int) -> list[dict]:
    rows = []
    for count in range(1, len(WORLD.places) + 1):
        images, truths = zip(*(sample_picture("test", index, count=count) for index in range(num)), strict=True)
        caption_embeds = encode(model, processor, images)
        captions = Captioner(model, processor, Decoding()).write(range(num), caption_embeds)
        captioned = [_parsed(best.text) for best, *_ in captions]
        pictures = rebuild(model, caption_embeds)
        found = scene_reader().read(pictures)
        for size in WORLD.sizes:
            counts = []  # for each image, about its objects of this size
            for image, truth, picture, rebuilt, said in zip(images, truths, pictures, found, captioned, strict=True):
                objects = [item for item in truth.objects if item.size == size]
                right = [item for item in objects if item in rebuilt.objects]
                told = sum(said is not None and item in said.objects for item in objects)
                places = [centre(image, truth, item) for item in right]
                errors = [
                    np.linalg.norm(centre(picture, truth, item) - at) for item, at in zip(right, places, strict=True)
                ]
                centred = [np.linalg.norm(at - cell_centre(item)) for item, at in zip(right, places, strict=True)]
                counts.append((len(objects), told, len(right), sum(errors), sum(centred)))
            objects, told, right, errors, centred = np.array(counts).T
            rows.append(
                {
                    "objects in the scene": count,
                    "size": size,
                    "rebuilt right": share(right, objects),
                    "captioned right": share(told, objects),
                    "position error, pixels": share(errors, right) if right.any() else None,
                    "error of the cell's centre, pixels": share(centred, right) if right.any() else None,
                }
            )
    return rows


def centre(picture: Image.Image, scene: Scene, item: SceneObject) -> np.ndarray:
    """Centre of mass (x, y) of an object in its cell, in pixels. A pixel's mass says how near it is to its colour."""
    left, top, width, height = _cell(item)
    pixels = np.asarray(picture, dtype=float)[top : top + height, left : left + width]
    paper, paint = np.array(WORLD.backgrounds[scene.background]), np.array(WORLD.colours[item.colour])
    mass = ((pixels - paper) @ (paint - paper) / np.square(paint - paper).sum()).clip(0, 1)
    mass[mass < 0.1] = 0  # noise of the decoder on the background
    y, x = np.mgrid[:height, :width] + 0.5
    return np.array([left + (x * mass).sum() / mass.sum(), top + (y * mass).sum() / mass.sum()])


def cell_centre(item: SceneObject) -> np.ndarray:
    left, top, width, height = _cell(item)
    return np.array([left + width / 2, top + height / 2])


def _cell(item):
    row, column = divmod(WORLD.places.index(item.place), WORLD.columns)
    width, height = WORLD.image_size // WORLD.columns, WORLD.image_size // WORLD.rows
    return column * width, row * height, width, height


def _parsed(caption):
    try:
        return parse_caption(caption)
    except ValueError:
        return None


def plot(rows: list[dict], figure: Figure) -> None:
    right, errors = figure.subplots(1, 2)
    for size, style in zip(WORLD.sizes, ("--", "-"), strict=True):
        found = [row for row in rows if row["size"] == size]
        counts = [row["objects in the scene"] for row in found]
        for axes, column, colour in (
            (right, "rebuilt right", "C0"),
            (right, "captioned right", "C1"),
            (errors, "position error, pixels", "C0"),
            (errors, "error of the cell's centre, pixels", "C7"),
        ):
            values = [row[column] for row in found]
            axes.errorbar(
                counts,
                [it["value"] for it in values],
                [it["standard_error"] for it in values],
                linestyle=style,
                color=colour,
                marker="o",
                label=f"{column}, {size}",
            )
    right.set(xlabel="objects in the scene", ylabel="share of objects", xticks=range(1, len(WORLD.places) + 1))
    errors.set(xlabel="objects in the scene", ylabel="pixels", ylim=0, xticks=range(1, len(WORLD.places) + 1))
    for axes in (right, errors):
        axes.legend(fontsize="small")
