"""The experiments that train models: the models that each one compares, as data, and their measurement.

Each run is measured separately and has its own JSON in docs/results. `Plan` says what the runs have in common.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments import peers
from experiments.making import ENCODER, Assembled, Bundled, Kept, Scenes, Spoilt, TinysPart, Training
from modeling_vlv import VLVForConditionalGeneration
from vlv.evaluation.results import Measurement
from vlv.models.loading import load_whole
from vlv.provenance import git_commit
from vlv.scenes import World, world
from vlv.scenes.scorer import SceneScorer, score_captions

READERS = ["queries", "projection"]  # the new parts of a VLV's encoder
LANGUAGE = [*READERS, "language_model"]  # the parts that stage 1 trains
HEAD = ["prefix_projection", "caption_head"]  # the parts that stage 2 trains; the paper also trains the language model
# Florence's own parts need a smaller learning rate than new parts, or they lose their pretraining. The rates were
# chosen on validation scenes.
STAGE1_RATES = {"learning_rate": 2e-3, "encoder_learning_rate": 1e-4}
STAGE2_RATES = {"encoder_learning_rate": 2e-5}  # the recipe's own rate, for the caption head, is 1e-3
WHOLE_ENCODER = [*LANGUAGE, "image_projection", "vision_tower", "word_embeddings"]
# Sizes of caption heads: (width, layers).
SMALL, MEDIUM, LARGE = (64, 1), (128, 2), (192, 4)
LLAVAS = (192, 6)  # gives a LLaVA as many parameters as a VLV with a medium head
Made = Assembled | Bundled | Training  # a VLV to start from
MAX_NEW_TOKENS = 48  # the longest true caption has 21 tokens


@dataclass(frozen=True)
class Run:
    """
    One trained captioner; its JSON is docs/results/`name`.json.

    Args:
        world, splits: of the scenes that it is measured on.
    """

    name: str
    model: Training
    world: str = "shapes"
    splits: tuple[str, ...] = ("test",)

    def make(self, work: Path, num: int) -> dict[str, Any]:
        """Trains what is missing, and measures it on `num` unseen scenes."""
        start = time.perf_counter()
        folder = self.model.make(work)
        records = list(self.model.records(work))
        stage = records[-1]["recipe"]["stage"]
        scores, parameters = measure(folder, stage, num, world(self.world), self.splits)
        return {
            "scores": {name: asdict(score) for name, score in scores.items()},
            "num": num,
            "parameters": parameters,
            "seed": records[-1]["seed"],
            "commit": git_commit(),
            "versions": {name: version(name) for name in ("vlv", "torch", "transformers", "diffusers")},
            "seconds": round(time.perf_counter() - start),
            "trainings": records,
        }


def measure(
    folder: Path, stage: str, num: int, drawn: World, splits: Sequence[str]
) -> tuple[dict[str, Measurement], int]:
    """Scores of the captioner in `folder`, which `stage` trained, and the number of parameters for captioning."""
    pictures = {split: [drawn.sample_picture(split, index) for index in range(num)] for split in splits}
    scores = {}
    if stage == "caption":
        model, processor = load_whole(str(folder))
        scorer = SceneScorer(model.float().eval(), processor, drawn)
        model.generation_config.max_new_tokens = MAX_NEW_TOKENS
        for split, shown in pictures.items():
            scores |= scorer.captions(shown, split) | scorer.reconstructions(shown, split)
        return scores, VLVForConditionalGeneration(model.config).num_parameters()
    peer = peers.LOADERS[stage](folder)
    for split, shown in pictures.items():
        captions = peer.write([image for image, _ in shown], MAX_NEW_TOKENS)
        scores |= score_captions(captions, shown, split, drawn)
    return scores, peer.model.num_parameters()


@dataclass(frozen=True)
class Row:
    """One line of a table: settings by column, and runs that differ only in their seed."""

    settings: dict[str, Any]
    runs: Sequence[Run]


@dataclass(frozen=True)
class Experiment:
    """
    Args:
        x: the column on the x axis of the plot. Each value of the other columns is a line.
        log: whether the x axis is logarithmic.
    """

    name: str
    rows: Sequence[Row]
    x: str
    log: bool = False


@dataclass(frozen=True)
class Plan:
    """
    The sizes of all trainings. A test makes them small.

    Args:
        stage1, stage2: steps of the two stages. Models without stage 1 train for the sum of them.
        heads: steps of stage 2 when caption heads are compared, because the largest head learns slowly.
        batch: images or captions per step.
        images: number of images for stage 1, and of captions that the language models are trained on as text.
        captions: number of captions for stage 2, if the experiment does not change it.
        language: steps of the language models.
        flow_teacher: steps of the second tiny teacher.
        cleaned: numbers of captions, a fifth of which are wrong.
        seeds: of the experiments that show a spread over seeds; the others use the first one.
    """

    stage1: int = 2400
    stage2: int = 400
    heads: int = 1200
    batch: int = 32
    images: int = 50_000
    captions: int = 10_000
    few_captions: Sequence[int] = (100, 1000, 50_000)
    few_images: Sequence[int] = (100, 1000, 10_000)
    language: int = 500
    flow_teacher: int = 1600
    flow_images: int = 30_000
    cleaned: Sequence[int] = (100, 250, 1000)
    evaluation: int = 100
    save_steps: int = 400
    seeds: Sequence[int] = (0, 1, 2)

    def experiments(self) -> list[Experiment]:
        """All experiments, the most important first."""
        return [
            self.compare_captioners(),
            self.compare_queries(),
            self.compare_text_encoder(),
            self.compare_teachers(),
            self.compare_images(),
            self.compare_parts(),
            self.compare_heads(),
            self.compare_cleaning(),
        ]

    def runs(self) -> list[Run]:
        """Every run once, the most important first: all runs with the first seed, then those with the second."""
        experiments = self.experiments()
        ordered = [
            run
            for number in range(len(self.seeds))
            for experiment in experiments
            for row in experiment.rows
            for run in row.runs[number : number + 1]
        ]
        return list({run.name: run for run in ordered}.values())

    # ---- the experiments -----------------------------------------------------------------------------------

    def compare_captioners(self) -> Experiment:
        """VLVs with and without stage 1, with a frozen or trained encoder, and the peers, by number of captions."""
        arms = {
            "VLV, encoder frozen": lambda n, seed: self.caption(self.autoencode(self.start(seed)), n, seed),
            "VLV, encoder trained": lambda n, seed: self.caption(
                self.autoencode(self.start(seed)), n, seed, [*HEAD, "language_model"]
            ),
            "VLV, vlv-tiny's stage 1": lambda n, seed: self.caption(Bundled(), n, seed),
            "no stage 1, encoder frozen": lambda n, seed: self.caption_alone(n, seed, [*HEAD, *READERS]),
            "no stage 1, encoder trained": lambda n, seed: self.caption_alone(n, seed, [*HEAD, *LANGUAGE]),
            "LLaVA": self.llava,
            "Florence-2": self.florence,
        }
        rows = [
            Row(
                {"captioner": arm, "captions": count},
                [Run(f"captioners/{_slug(arm)}-{count}-seed{seed}", make(count, seed)) for seed in self.seeds],
            )
            for arm, make in arms.items()
            for count in self.few_captions
        ]
        return Experiment("captioners", rows, x="captions", log=True)

    def compare_queries(self) -> Experiment:
        def runs(queries):
            return [Run(f"queries/{queries}-seed{seed}", self.whole(seed, num_queries=queries)) for seed in self.seeds]

        rows = [Row({"queries": queries}, runs(queries)) for queries in (1, 4, 12)]
        return Experiment("queries", [*rows, Row({"queries": 24}, self.base())], x="queries")

    def compare_text_encoder(self) -> Experiment:
        bypassed = [Run(f"text_encoder/bypassed-seed{s}", self.whole(s, bypass_text_encoder=True)) for s in self.seeds]
        rows = [Row({"text encoder": "in the path"}, self.base()), Row({"text encoder": "bypassed"}, bypassed)]
        return Experiment("text_encoder", rows, x="text encoder")

    def compare_teachers(self) -> Experiment:
        """The bundled UNet and a flow-matching transformer, which has no text encoder in a VLV."""
        bypassed = [Run(f"text_encoder/bypassed-seed{s}", self.whole(s, bypass_text_encoder=True)) for s in self.seeds]
        teacher = self.training(
            "tiny/flow_teacher", self.flow_images, self.flow_teacher, 0, vae=TinysPart("decoder/vae")
        )
        seed = self.seeds[0]
        start = Assembled(seed, {"num_queries": 24}, teacher)
        flow = Run(f"teachers/flow-seed{seed}", self.caption(self.autoencode(start), self.captions, seed))
        rows = [
            Row({"teacher": "UNet", "text encoder": "in the path"}, self.base()),
            Row({"teacher": "UNet", "text encoder": "bypassed"}, bypassed),
            Row({"teacher": "flow transformer", "text encoder": "bypassed"}, [flow]),
        ]
        return Experiment("teachers", rows, x="teacher")

    def compare_images(self) -> Experiment:
        def run(images):
            model = self.autoencode(self.start(self.seeds[0]), images)
            return Run(f"images/{images}", self.caption(model, self.captions, self.seeds[0]))

        rows = [Row({"stage-1 images": images}, [run(images)]) for images in self.few_images]
        rows.append(Row({"stage-1 images": self.images}, self.base()[:1]))
        return Experiment("images", rows, x="stage-1 images", log=True)

    def compare_parts(self) -> Experiment:
        seed = self.seeds[0]

        def row(first, second, name=None, stage1=LANGUAGE, stage2=HEAD, rates=STAGE1_RATES):
            model = self.autoencode(self.start(seed), parts=stage1, rates=rates)
            model = self.caption(model, self.captions, seed, stage2)
            runs = [Run(f"parts/{name}", model)] if name else self.base()[:1]
            return Row({"trains in stage 1": first, "in stage 2": second}, runs)

        usual = "+ language model", "prefix, caption head"
        rows = [
            row("queries, projection", usual[1], "new-parts", stage1=READERS),
            row(*usual),
            row("+ language model, one rate", usual[1], "one-rate", rates={}),
            row("+ all of the encoder", usual[1], "whole-encoder", stage1=WHOLE_ENCODER),
            row(usual[0], "prefix", "prefix", stage2=HEAD[:1]),
            row(usual[0], "+ language model", "language-model", stage2=[*HEAD, "language_model"]),
        ]
        return Experiment("parts", rows, x="trains in stage 1")

    def compare_heads(self) -> Experiment:
        def run(size):
            seed = self.seeds[0]
            model = self.captioning(self.autoencode(self.start(seed)), self.captions, self.heads, seed, HEAD, size)
            return Run(f"heads/{size[0]}x{size[1]}", model)

        rows = [Row({"layers x width": f"{size[1]} x {size[0]}"}, [run(size)]) for size in (SMALL, MEDIUM, LARGE)]
        return Experiment("heads", rows, x="layers x width")

    def compare_cleaning(self) -> Experiment:
        """A caption head on captions a fifth of which are wrong, and on what `vlv score --keep` leaves of them."""

        def runs(name, count, dataset, seeds):
            trainings = [self.caption(Bundled(), count, seed) for seed in seeds]
            return [
                Run(f"cleaning/{name}-{count}-seed{seed}", replace(it, settings=it.settings | {"dataset": dataset}))
                for seed, it in zip(seeds, trainings, strict=True)
            ]

        rows = []
        for count in self.cleaned:
            seeds = self.seeds if count < 1000 else self.seeds[:1]
            spoilt = Spoilt(Scenes(count))
            sets = {
                "all right": runs("right", count, Scenes(count), seeds),
                "a fifth wrong": runs("spoilt", count, spoilt, seeds),
                "a fifth wrong, best 80% kept": runs("kept-80", count, Kept(spoilt, 0.8), seeds),
            }
            rows += [Row({"captions": count, "training set": name}, listed) for name, listed in sets.items()]
        return Experiment("cleaning", rows, x="training set")

    # ---- the models ----------------------------------------------------------------------------------------

    def base(self) -> list[Run]:
        """The baseline of all comparisons: a VLV without changes."""
        return [Run(f"base/seed{seed}", self.whole(seed)) for seed in self.seeds]

    def whole(self, seed: int, **config) -> Training:
        return self.caption(self.autoencode(self.start(seed, **config)), self.captions, seed)

    def start(self, seed: int, **config) -> Assembled:
        return Assembled(seed, config)

    def language_model(self, size: tuple[int, int]) -> Training:
        width, layers = size
        settings = {"hidden_size": width, "num_hidden_layers": layers}
        return self.training("tiny/language", self.images, self.language, 0, **settings)

    def autoencode(
        self,
        start: Assembled,
        images: int | None = None,
        parts: Sequence[str] = LANGUAGE,
        rates: dict[str, float] = STAGE1_RATES,
    ) -> Training:
        settings = {"model": start, "train_parts": list(parts), **_rates(rates, parts)}
        return self.training("tiny/autoencode", images or self.images, self.stage1, start.seed, **settings)

    def caption(self, model: Made, captions: int, seed: int, parts: Sequence[str] = HEAD) -> Training:
        return self.captioning(model, captions, self.stage2, seed, parts)

    def caption_alone(self, captions: int, seed: int, parts: Sequence[str]) -> Training:
        return self.captioning(self.start(seed), captions, self.stage1 + self.stage2, seed, parts)

    def captioning(
        self,
        model: Made,
        captions: int,
        steps: int,
        seed: int,
        parts: Sequence[str],
        head: tuple[int, int] = MEDIUM,
    ) -> Training:
        settings = {"model": model, "caption_head": self.language_model(head), "train_parts": list(parts)}
        settings |= _rates(STAGE2_RATES, parts)
        if not {"language_model", "queries"} & set(parts):
            # Caching saves time only if each image is seen more than once.
            settings["cache_features"] = steps * self.batch > 2 * captions
        return self.training("tiny/caption", captions, steps, seed, save_dtype="float16", **settings)

    def llava(self, captions: int, seed: int) -> Training:
        settings = {"encoder": ENCODER, "language": self.language_model(LLAVAS)}
        return self.training("experiments/recipes/llava.yaml", captions, self.stage1 + self.stage2, seed, **settings)

    def florence(self, captions: int, seed: int) -> Training:
        settings = {"encoder": ENCODER, "caption_column": "text", "max_length": 32}
        return self.training("tiny/encoder", captions, self.stage1 + self.stage2, seed, **settings)

    def training(self, recipe: str, scenes: int, steps: int, seed: int, **settings) -> Training:
        common = {
            "dataset": Scenes(scenes),
            "eval_dataset": Scenes(self.evaluation, "validation"),
            "eval_size": self.evaluation,
            "max_steps": steps,
            "per_device_train_batch_size": self.batch,
            "save_steps": self.save_steps,
            "save_total_limit": 1,
            "seed": seed,
        }
        return Training(recipe, common | settings)


def _rates(rates, parts):
    """`rates`, without the rate of Florence's own parts if none of them trains."""
    return {name: rate for name, rate in rates.items() if name == "learning_rate" or "language_model" in parts}


def _slug(text):
    return text.lower().translate({ord(","): None, ord("'"): None}).replace(" ", "-")
