"""
Captioning a folder: the paper's settings compared with this package's defaults.

    python benchmarks/captioning.py [--size tiny|mid|published] [--images 64] [--sides SIDE ...]
        [--repeats 5] [--output FILE]

`paper` captions four images at a time, with eager attention and four beams, and reads no image ahead. Each lever is
`paper` with one change. `like for like` is the default engine with the paper's search; it must write equal captions.
`as shipped` is the default. All sides use the same precision: float32 on a CPU, bfloat16 on a GPU.

The captions of `tiny` are compared with the true ones. At the other sizes, the lengths of captions are drawn (see
measure.py).
"""

import json
import tempfile
from functools import partial
from pathlib import Path

import measure
import torch
from transformers import LogitsProcessor

from vlv.captioning.captioner import Captioner
from vlv.captioning.engine import caption_locally
from vlv.captioning.settings import Decoding
from vlv.captioning.sources import open_source
from vlv.models.loading import load_captioner
from vlv.scenes import write_scenes

PAPER = {"attention": "eager", "num_beams": 4, "batch_size": 4, "num_workers": 0}
DEFAULT = {"attention": "sdpa", "num_beams": 1, "batch_size": None, "num_workers": None}
LEVERS = {f"paper, {name} as by default": {**PAPER, name: value} for name, value in DEFAULT.items()}
MODES = {"paper": PAPER, **LEVERS, "like for like": {**DEFAULT, "num_beams": 4}, "as shipped": DEFAULT}


class EndAt(LogitsProcessor):
    """Ends each caption at its length, and not earlier."""

    def __init__(self, lengths: list[int], eos_token_id: int):
        self.lengths, self.eos_token_id = torch.tensor(lengths), eos_token_id

    def keep(self, rows):
        self.lengths = self.lengths[rows.cpu()]

    def __call__(self, input_ids, scores):
        beams = len(scores) // len(self.lengths)
        ends = (self.lengths.repeat_interleave(beams) <= input_ids.shape[1] + 1).to(scores.device)
        scores[:, self.eos_token_id] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, self.eos_token_id] = 0.0
        return scores


class CaptionerOfLengths(Captioner):
    """Writes captions whose lengths in tokens are given by the images' names. Stops beams early, as the paper does."""

    def __init__(self, *arguments, lengths: dict[str, int] | None):
        super().__init__(*arguments)
        self.lengths = lengths

    def generation_arguments(self, names, spelling):
        arguments = super().generation_arguments(names, spelling) | {"early_stopping": self.decoding.num_beams > 1}
        if self.lengths is not None:
            arguments["logits_processor"].append(EndAt([self.lengths[name] for name in names], self.eos_token_ids[0]))
        return arguments


class Side:
    """One set of settings. Its first turn finds the largest batch that memory allows."""

    def __init__(self, mode, models, source, lengths):
        self.captioner = CaptionerOfLengths(
            *models[mode["attention"]], Decoding(num_beams=mode["num_beams"]), mode["batch_size"], lengths=lengths
        )
        self.caption = partial(caption_locally, source, (), self.captioner, mode["num_workers"])

    def __call__(self) -> float:
        return measure.seconds_of(self.work) / len(self.captions)

    def work(self) -> None:
        rows = [row for batch in self.caption() for row in batch]
        self.captions = {row["file_name"]: row["text"] for row in rows}


def main() -> None:
    parser = measure.parser(__doc__, default_images=64, sides=MODES)
    parser.add_argument(
        "--repeats", type=measure.at_least_one, default=measure.REPEATS, help="turns of a side, after a warm-up"
    )
    arguments = parser.parse_args()
    device = measure.find_device(arguments.size)
    with tempfile.TemporaryDirectory() as temporary:
        scenes = write_scenes(Path(temporary) / "scenes", arguments.images, seed=0, split="test")
        lines = (scenes / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        truths = {row["file_name"]: row["text"] for row in map(json.loads, lines)}
        source = open_source([str(scenes)])
        model = measure.checkpoint(arguments.size, Path(temporary) / "model")
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        models = {
            attention: load_captioner(model, str(device), dtype, attn_implementation=attention)
            for attention in ("eager", "sdpa")
        }
        lengths = None
        if arguments.size != "tiny":
            lengths = dict(zip(truths, measure.draw_lengths(len(truths)), strict=True))
        sides = {
            name: Side(MODES[name], models, source, lengths) for name in dict.fromkeys(["paper", *arguments.sides])
        }
        seconds = measure.take_turns(sides, arguments.repeats)
        shipped = sides.get("as shipped", sides["paper"])
        # On a GPU, a caption takes so many kernels that a profile of them would take longer than all turns.
        profile = {} if device.type == "cuda" else {"profile": measure.profile(shipped.work)}
    found = measure.compare(seconds, "paper")
    for name, side in sides.items():
        found[name]["batch_size"] = side.captioner.batch_size
        if arguments.size == "tiny":
            paper = sides["paper"].captions
            found[name]["captions_as_papers"] = sum(side.captions[file] == paper[file] for file in truths) / len(
                truths
            )
            found[name]["captions_right"] = sum(side.captions[file] == truths[file] for file in truths) / len(truths)
    measure.write(
        arguments.output,
        "captioning",
        arguments.size,
        found,
        images=arguments.images,
        dtype=dtype,
        parameters=sum(parameter.numel() for parameter in models["sdpa"][0].parameters()),
        **profile,
    )


if __name__ == "__main__":
    main()
