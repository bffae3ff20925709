"""
What it costs that the paper's captioner never learnt to end, and what a converted checkpoint does about it.

    python benchmarks/stopping.py [--images 256] [--work outputs/stopping] [--output FILE]

It fine-tunes vlv-tiny on captions of several sentences without their end, which is the paper's flaw (see
endless.yaml), and captions unseen scenes. The `paper` side writes 300 tokens for each and then cuts and cleans them as
the paper's code does, written down here a second time. The other side has the data that `vlv convert` puts into a
checkpoint. Both search greedily, and then with the paper's four beams. The time is that of one turn of each.
"""

import json
import re
import statistics
from pathlib import Path

import measure
import torch

from processing_vlv import VLVProcessor
from stopping_vlv import stop_at_repetition
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.commands import train
from vlv.files import atomic_folder
from vlv.models.loading import load_captioner
from vlv.scenes import sample_picture
from vlv.scenes.shapes import Scene

SCENES = 400  # to train on
DETAILS = 13  # sentences on what is not there, at most
LENGTH = 300  # tokens, the paper's
BATCH = 32
ABSENT = {"place": "The {} is empty.", "shape": "There is no {}.", "colour": "Nothing is {}."}
SEARCHES = {"greedy": 1, "4 beams": 4}


def sentences(scene: Scene, details: int = 0) -> str:
    """
    The scene in some sentences for each thing on it, and as many as `details` on what is not. Like the paper's,
    captions are long and of any length.
    """
    said, absent = [], []
    for one in scene.objects:
        said.append(f"A {one.size} {one.colour} {one.shape} is at the {one.place}.")
        said.append(f"The {one.shape} at the {one.place} is {one.colour}.")
        said.append(f"The {one.colour} {one.shape} is {one.size}.")
    said.append(f"The background is {scene.background}.")
    for attribute, sentence in ABSENT.items():
        there = {getattr(one, attribute) for one in scene.objects}
        absent += [sentence.format(word) for word in Scene.objects_are.known[attribute] if word not in there]
    return " ".join(said + absent[:details])


def trained(work: Path) -> str:
    """The folder of the captioner that never ends."""
    if not (work / "scenes").exists():
        with atomic_folder(work / "scenes") as folder, (folder / "metadata.jsonl").open("w") as rows:
            for index in range(SCENES):
                image, scene = sample_picture("train", index)
                image.save(folder / f"{index}.png")
                rows.write(json.dumps({"file_name": f"{index}.png", "text": sentences(scene, index % DETAILS)}) + "\n")
    output = work / "endless"
    if not (output / "training.json").exists():
        recipe = Path(__file__).with_name("endless.yaml")
        train.main([str(recipe), "--dataset", str(work / "scenes"), "--output_dir", str(output), "--resume"])
    return str(output)


def the_papers(text: str) -> str:
    """A caption as the paper's code leaves it: up to its last full stop, and each sentence the first time only."""
    if not text.endswith("."):
        text = text[: text.rfind(".") + 1] or text
    kept = []
    for sentence in split(text):
        if sentence and sentence not in kept:
            kept.append(sentence)
    return " ".join(kept)


class Side:
    """One way to caption the images."""

    def __init__(self, model, processor: VLVProcessor, pixel_values: torch.Tensor, num_beams: int):
        self.captioner = Captioner(model, processor, Decoding(LENGTH, num_beams=num_beams), BATCH)
        self.pixel_values = pixel_values

    def __call__(self) -> float:
        return measure.seconds_of(self.work) / len(self.pixel_values)

    def work(self) -> None:
        names = [str(number) for number in range(len(self.pixel_values))]
        self.captions = [best for best, *_ in self.captioner(names, self.pixel_values)]


def main() -> None:
    parser = measure.parser(__doc__, default_images=256)
    parser.add_argument("--work", type=Path, default=Path("outputs/stopping"), help="folder for what is trained")
    arguments = parser.parse_args()
    folder = trained(arguments.work)
    pictures = [sample_picture("test", index) for index in range(arguments.images)]
    truths = [split(sentences(scene, details=100)) for _, scene in pictures]
    models = [load_captioner(folder, "cpu") for _ in range(2)]
    stop_at_repetition(*models[1])
    pixel_values = models[0][1](images=[image for image, _ in pictures])["pixel_values"]
    found = {}
    for search, num_beams in SEARCHES.items():
        paper, stopped = (Side(*model, pixel_values, num_beams) for model in models)
        names = f"{search}, paper", f"{search}, stops where it repeats itself"
        compared = measure.compare({names[0]: [paper()], names[1]: [stopped()]}, names[0])
        expected = [the_papers(caption.text) for caption in paper.captions]
        texts = expected, [caption.text for caption in stopped.captions]
        for name, side, written in zip(names, (paper, stopped), texts, strict=True):
            pairs = list(zip(written, truths, strict=True))
            tokens = [caption.num_tokens for caption in side.captions]
            compared[name] |= {
                "tokens": statistics.mean(tokens),
                "most_tokens": max(tokens),
                "sentences_true": share([said in truth for text, truth in pairs for said in split(text)]),
                "captions_as_papers": share([text == whole for text, whole in zip(written, expected, strict=True)]),
                "beginnings_of_papers": share(
                    [whole.startswith(text) for text, whole in zip(written, expected, strict=True)]
                ),
                "batch_size": BATCH,
            }
        found |= compared
    measure.write(arguments.output, "stopping", "tiny", found, images=arguments.images)


def split(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text)


def share(cases: list[bool]) -> float:
    return sum(cases) / len(cases)


if __name__ == "__main__":
    main()
