"""Does the diffusion teacher help to caption drawings of an unseen artist? vlv-emoji is compared with its peers.

    python -m experiments.emoji           measures what is missing in docs/results/emoji, then prints the table

Every captioner learns from the same captions of the same pictures. VLV continues from vlv-emoji's stage 1; Florence-2
and LLaVA from the encoder as it was before stage 1.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import __main__ as command
from experiments.making import Bundled, Checkpoint, Scenes, Training
from experiments.report import gather, table
from experiments.trained import Experiment, Row, Run
from vlv import cli
from vlv.scenes.emoji import EmojiWorld

COLUMNS = {
    "captions exact": "captions/test/exact",
    "things right": "captions/test/objects_right",
    "never-seen combinations": "captions/novel/objects_right",
    "names, unseen artist": "captions/artist/name_right",
}
# Parts of vlv-emoji, in half precision.
ENCODER = Checkpoint("experiments/parts/emoji/encoder")
LANGUAGE = Checkpoint("experiments/parts/emoji/language")
LLAVAS = {"hidden_size": 320, "num_hidden_layers": 5}  # gives LLaVA about as many parameters as the VLV


@dataclass(frozen=True)
class EmojiPlan:
    """
    The sizes of all trainings. A test makes them small.

    Args:
        captions: number of scenes to learn captions from.
        steps: training steps of every captioner.
        language: training steps of LLaVA's language model, on text alone.
        batch: captions of a step.
    """

    captions: int = 60_000
    steps: int = 2000
    language: int = 1500
    batch: int = 32
    seeds: Sequence[int] = (0, 1, 2)

    def experiments(self) -> list[Experiment]:
        arms = {"VLV": self.vlv, "Florence-2": self.florence, "LLaVA": self.llava}
        rows = [
            Row(
                {"captioner": name},
                [
                    Run(f"emoji/{name.lower()}-seed{seed}", make(seed), "emoji", EmojiWorld.unseen)
                    for seed in self.seeds
                ],
            )
            for name, make in arms.items()
        ]
        return [Experiment("emoji", rows, x="captioner")]

    def runs(self) -> list[Run]:
        (experiment,) = self.experiments()
        return [row.runs[number] for number in range(len(self.seeds)) for row in experiment.rows]

    def vlv(self, seed: int) -> Training:
        settings = {"model": Bundled("vlv-emoji"), "caption_head": LANGUAGE}
        return self.training("emoji/caption", self.steps, seed, **settings)

    def florence(self, seed: int) -> Training:
        settings = {"encoder": ENCODER, "caption_column": "text", "max_length": 32}
        return self.training("emoji/encoder", self.steps, seed, **settings)

    def llava(self, seed: int) -> Training:
        language = self.training("emoji/language", self.language, 0, **LLAVAS)
        settings = {"encoder": ENCODER, "language": language, "muon_learning_rate": 2e-3}
        return self.training("experiments/recipes/llava.yaml", self.steps, seed, **settings)

    def training(self, recipe: str, steps: int, seed: int, **settings) -> Training:
        common = {
            "dataset": Scenes(self.captions, "train", "emoji", {"varied": 0.5}),
            "eval_dataset": Scenes(200, "validation", "emoji"),
            "max_steps": steps,
            "per_device_train_batch_size": self.batch,
            "seed": seed,
        }
        return Training(recipe, common | settings)


def main(argv: list[str], plan: EmojiPlan | None = None, output: Path = Path("docs/results")) -> None:
    plan = plan or EmojiPlan()
    command.main(["emoji", "--output", str(output), *argv], plan)
    (experiment,) = plan.experiments()
    print(table(gather(experiment, output, COLUMNS)))


if __name__ == "__main__":
    sys.exit(cli.run("python -m experiments.emoji", lambda: main(sys.argv[1:]), is_process=True))
