"""Describes what an experiment trains as data, and makes what is missing: scenes, assembled models, trainings.

Each is a dataclass with `make(work) -> folder`. Its settings may be other such objects, which are made first:

    stage1 = Training("tiny/autoencode", {"dataset": Scenes(1000), "model": Assembled(seed=0)})
    Training("tiny/caption", {"dataset": Scenes(100), "model": stage1}).make(Path("outputs/experiments"))

What two runs share, such as a stage 1, is made once, in a folder whose name is a hash of all its inputs. Several
processes may work in one folder; each skips what another one is making.
"""

import fcntl
import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from transformers import set_seed

from experiments.spoiling import spoilt_captions
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv import bundled_checkpoint, find_bundled
from vlv.commands import score, train
from vlv.files import atomic_folder
from vlv.models.export import export_parts
from vlv.models.loading import load_whole
from vlv.scenes import WORLD, world, write_scenes
from vlv.scenes.doodles import Doodles
from vlv.training.recipe import find_recipe, read_recipe_file

SPOILT = 5  # every fifth caption of a spoilt set is wrong


@contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[None]:
    """Prevents other processes from making `path`. If one of them is making it: BlockingIOError, or a wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.claim").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def once(folder: Path, last: str, fill: Callable[[], Any]) -> Path:
    """The folder, filled by `fill`. It is complete if it has the file `last`, which `fill` writes at the end."""
    if not (folder / last).exists():
        with claimed(folder):
            if not (folder / last).exists():
                fill()
    return folder


def digest(thing: Any) -> str:
    """A short hash of a dataclass and all its fields."""
    return hashlib.sha256(repr(thing).encode()).hexdigest()[:12]


@cache
def weights_of(source: str) -> str:
    """A short hash of the weights of a bundled checkpoint, or of those in a folder."""
    total = hashlib.sha256()
    for file in sorted(Path(find_bundled(source)).glob("*.safetensors")):
        total.update(file.read_bytes())
    return total.hexdigest()[:12]


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A checkpoint of this repository, bundled or in a folder. With other weights it is another one."""

    name: str

    def __repr__(self) -> str:  # what `digest` reads
        return f"{type(self).__name__}({self.name!r}, {weights_of(self.name)})"

    def make(self, work: Path) -> Path:
        return Path(self.name)


ENCODER = Checkpoint("experiments/parts/encoder")  # the result of tiny/encoder, in half precision


@dataclass(frozen=True, repr=False)
class Bundled(Checkpoint):
    """A bundled checkpoint without its caption head: a finished stage 1."""

    name: str = "vlv-tiny"

    def make(self, work: Path) -> Path:
        folder = work / f"{self.name}-without-head-{digest(self)}"
        return once(folder, "config.json", lambda: self._write(folder))

    def _write(self, folder):
        source = bundled_checkpoint(self.name)
        model = VLVModel.from_pretrained(source, caption_config=None, dtype="float32")
        _save(folder, model, VLVProcessor.from_pretrained(source))


@dataclass(frozen=True)
class Scenes:
    """
    The first `num` drawn scenes of a split of a world. A larger set contains the smaller ones.

    Args:
        settings: the settings of the world.
    """

    num: int
    split: str = "train"
    world: str = "shapes"
    settings: dict[str, Any] = field(default_factory=dict)

    def make(self, work: Path) -> Path:
        settings = [f"{name}-{value}" for name, value in self.settings.items()]
        names = [*([] if self.world == "shapes" else [self.world]), *settings, self.split, str(self.num)]
        folder = work / "-".join(["scenes", *names])
        drawn = Doodles() if self.world == "doodles" else world(self.world, **self.settings)
        return once(folder, "metadata.jsonl", lambda: write_scenes(folder, self.num, split=self.split, world=drawn))


@dataclass(frozen=True)
class Spoilt:
    """Scenes of which every fifth has a wrong caption, in the ways of `experiments.spoiling` in turn."""

    scenes: Scenes

    def make(self, work: Path) -> Path:
        folder = work / f"spoilt-{digest(self)}"
        return once(folder, "metadata.jsonl", lambda: self._spoil(self.scenes.make(work), folder))

    def _spoil(self, source, folder):
        lines = (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        wrong = spoilt_captions([WORLD.parse_caption(row["text"]) for row in rows])
        with atomic_folder(folder) as unfinished:
            for number, row in enumerate(rows):
                os.link(source / row["file_name"], unfinished / row["file_name"])
                if number % SPOILT == 0:
                    texts = [texts[number] for texts in list(wrong.values())[number // SPOILT % len(wrong) :]]
                    row["text"] = next(filter(None, texts))
            text = "".join(json.dumps({"file_name": row["file_name"], "text": row["text"]}) + "\n" for row in rows)
            (unfinished / "metadata.jsonl").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Kept:
    """What `vlv score --keep` keeps of a dataset, by `explained` alone: the judge has no caption head."""

    dataset: Spoilt
    share: float
    judge: Bundled = Bundled()

    def make(self, work: Path) -> Path:
        output = work / f"scores-{digest(self)}.jsonl"
        return once(output.with_suffix(".kept"), "metadata.jsonl", lambda: self._keep(work, output))

    def _keep(self, work, output):
        judge = ["--model", str(self.judge.make(work)), "--scores", "explained"]
        given = ["--output", str(output), "--keep", str(self.share), "--overwrite"]
        score.main([str(self.dataset.make(work)), *judge, *given])


@dataclass(frozen=True)
class Training:
    """One run of `vlv train`. After an interruption it resumes. After a change of its recipe it is another run."""

    recipe: str
    settings: dict[str, Any]
    written: dict[str, Any] = field(init=False)  # what the recipe says

    def __post_init__(self):
        object.__setattr__(self, "written", read_recipe_file(find_recipe(self.recipe)))

    def make(self, work: Path) -> Path:
        return once(self.folder(work), "training.json", lambda: self._train(work))

    def _train(self, work):
        argv = [self.recipe, "--output_dir", str(self.folder(work)), "--cache_dir", str(work / "cache"), "--resume"]
        for name, value in self.settings.items():
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name}", *(str(one.make(work) if hasattr(one, "make") else one) for one in values)]
        train.main(argv)
        gc.collect()  # frees the dataset, which Trainer's reference cycles hold

    def folder(self, work: Path) -> Path:
        return work / f"{Path(self.recipe).stem}-{digest(self)}"

    def records(self, work: Path) -> Iterator[dict[str, Any]]:
        """The records of this training and of those before it, without their loss logs."""
        for setting in self.settings.values():
            for before in (setting.encoder, setting.decoder) if isinstance(setting, Assembled) else (setting,):
                if isinstance(before, Training):
                    yield from before.records(work)
        record = json.loads((self.folder(work) / "training.json").read_text(encoding="utf-8"))
        yield {name: value for name, value in record.items() if name != "log"}


@dataclass(frozen=True)
class TinysPart:
    """The folder of one part of vlv-tiny, as `vlv export` writes it. No stage changes its teacher, `decoder`."""

    name: str = "decoder"
    tiny: Checkpoint = Checkpoint("vlv-tiny")

    def make(self, work: Path) -> Path:
        folder = work / f"{self.tiny.name}-{digest(self.tiny)}"

        def export():
            with atomic_folder(folder) as unfinished:
                export_parts(*load_whole(self.tiny.name), unfinished)

        return once(folder, "decoder", export) / self.name


@dataclass(frozen=True)
class Assembled:
    """A VLV assembled from pretrained parts, without a caption head. Its queries and its projection are new."""

    seed: int
    settings: dict[str, Any] = field(default_factory=dict)  # of its config, and `projection_start`
    decoder: TinysPart | Training = TinysPart()
    encoder: Checkpoint | Training = ENCODER

    def make(self, work: Path) -> Path:
        folder = work / f"assembled-{digest(self)}"
        return once(folder, "config.json", lambda: self._assemble(work, folder))

    def _assemble(self, work, folder):
        parts = {"encoder": str(self.encoder.make(work)), "decoder": str(self.decoder.make(work))}
        config = dict(self.settings)
        set_seed(self.seed)
        new = {name: config.pop(name) for name in ("num_queries", "projection_start") if name in config}
        model = VLVModel.from_components(**parts, **new, dtype="float32")
        model.config.update(config)
        _save(folder, model, VLVProcessor.from_components(**parts))


def _save(folder, model, processor):
    with atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
