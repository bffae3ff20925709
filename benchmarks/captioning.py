"""
Captioning a folder: the paper's settings against this package's defaults.

    python benchmarks/captioning.py [--size tiny|mid] [--images 64] [--output captioning.json]

`paper` reads and captions four images at a time, with eager attention and four beams, and nothing is read ahead. Each
lever is `paper` with one change; `like for like` is the default engine with the paper's search, which must write equal
captions; `as shipped` is the default. The sides take turns, and each number is a median of five.

`tiny` is the bundled checkpoint on drawn scenes, and its captions are compared with the truth. `mid` has about 100
million random weights and 224x224 pixels; as random weights end no caption, the lengths are drawn once for all modes:
log-normal, median 90 tokens, sigma 0.4, at most 300.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from transformers import LogitsProcessor

from configuration_vlv import VLVConfig
from modeling_vlv import VLVForConditionalGeneration
from vlv import tiny_checkpoint
from vlv.captioning.captioner import Captioner
from vlv.captioning.engine import caption_locally
from vlv.captioning.settings import Decoding
from vlv.captioning.sources import open_source
from vlv.loading import load_captioner
from vlv.scenes import write_scenes

PAPER = {"attention": "eager", "num_beams": 4, "batch_size": 4, "num_workers": 0}
DEFAULT = {"attention": "sdpa", "num_beams": 1, "batch_size": None, "num_workers": None}
LEVERS = {f"paper, {name} as by default": {**PAPER, name: value} for name, value in DEFAULT.items()}
MODES = {"paper": PAPER, **LEVERS, "like for like": {**DEFAULT, "num_beams": 4}, "as shipped": DEFAULT}
REPEATS = 5


class EndAt(LogitsProcessor):
    """Ends each caption at its length, and none before."""

    def __init__(self, lengths: list[int], eos_token_id: int):
        self.lengths, self.eos_token_id = torch.tensor(lengths), eos_token_id

    def __call__(self, input_ids, scores):
        ends = self.lengths.repeat_interleave(len(scores) // len(self.lengths)) <= input_ids.shape[1] + 1
        scores[:, self.eos_token_id] = -torch.inf
        scores[ends.to(scores.device)] = -torch.inf
        scores[ends.to(scores.device), self.eos_token_id] = 0.0
        return scores


class CaptionerOfLengths(Captioner):
    """Writes captions of given lengths, in tokens, by the images' names."""

    def __init__(self, *arguments, lengths: dict[str, int]):
        super().__init__(*arguments)
        self.lengths = lengths

    def generation_arguments(self, names):
        arguments = super().generation_arguments(names)
        arguments["logits_processor"].append(EndAt([self.lengths[name] for name in names], self.eos_token_ids[0]))
        return arguments


def mid_config(tiny: VLVConfig) -> VLVConfig:
    """The bundled checkpoint's parts and tokenizers, widened to about 100 million parameters."""
    config = tiny.to_dict()
    config["decoder_config"] = None
    config["encoder_config"]["vision_config"] |= {
        **{"depths": [1, 1, 3, 1], "patch_size": [7, 3, 3, 3], "patch_stride": [4, 2, 2, 2]},
        **{"patch_padding": [3, 1, 1, 1], "patch_prenorm": [False, True, True, True]},
        **{"embed_dim": [64, 128, 256, 512], "num_heads": [2, 4, 8, 16], "num_groups": [2, 4, 8, 16]},
        **{"window_size": 7, "projection_dim": 512, "max_position_embeddings": 50},
    }
    bart = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in BART.items()}
    config["encoder_config"]["text_config"] |= {"d_model": 512, "max_position_embeddings": 1024, **bart}
    config["text_encoder_config"] |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    config["text_encoder_config"] |= {"num_attention_heads": 8, "max_position_embeddings": 77}
    config["caption_config"] |= {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 8}
    config["caption_config"] |= {"num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 64}
    config["caption_config"] |= {"vocab_size": 32_000, "max_position_embeddings": 1024, "layer_types": None}
    return VLVConfig.from_dict(config | {"num_queries": 77})


BART = {"layers": 4, "ffn_dim": 2048, "attention_heads": 8}


def load(size: str, attention: str):
    """A model with this attention; the same weights for each."""
    if size == "tiny":
        return load_captioner(None, attn_implementation=attention)
    model, processor = load_captioner(None)
    torch.manual_seed(0)
    mid = VLVForConditionalGeneration._from_config(mid_config(model.config), attn_implementation=attention).eval()
    mid.generation_config = model.generation_config
    processor.image_height = processor.image_width = 224
    return mid, processor


def run(models, source, lengths, mode) -> tuple[float, dict[str, str]]:
    """Images per second, and the captions."""
    make = Captioner if lengths is None else partial(CaptionerOfLengths, lengths=lengths)
    captioner = make(*models[mode["attention"]], Decoding(num_beams=mode["num_beams"]), mode["batch_size"])
    start = time.perf_counter()
    rows = [row for batch in caption_locally(source, (), captioner, mode["num_workers"]) for row in batch]
    return len(rows) / (time.perf_counter() - start), {row["file_name"]: row["text"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "mid"], default="tiny")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scenes = write_scenes(Path(folder) / "scenes", arguments.images, seed=0, split="test")
        lines = (scenes / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        truths = {row["file_name"]: row["text"] for row in map(json.loads, lines)}
        source = open_source([str(scenes)])
        models = {attention: load(arguments.size, attention) for attention in ("eager", "sdpa")}
        lengths = None
        if arguments.size == "mid":
            draw = random.Random(0)
            lengths = {name: min(300, max(1, round(90 * draw.lognormvariate(0, 0.4)))) for name in truths}
        speeds, captions = {name: [] for name in MODES}, {}
        for repeat in range(REPEATS + 1):  # the first warms up
            for name, mode in MODES.items():
                speed, captions[name] = run(models, source, lengths, mode)
                if repeat:
                    speeds[name].append(speed)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    result = {
        "size": arguments.size,
        "checkpoint": Path(tiny_checkpoint()).name if arguments.size == "tiny" else "random weights",
        "parameters": sum(parameter.numel() for parameter in models["sdpa"][0].parameters()),
        "images": arguments.images,
        "threads": torch.get_num_threads(),
        "images per second": speeds,
        "ratio to paper": {name: median / medians["paper"] for name, median in medians.items()},
        "captions equal to paper's": {
            name: sum(captions[name][file] == captions["paper"][file] for file in truths) / len(truths)
            for name in MODES
        },
    }
    if arguments.size == "tiny":
        result["captions exactly right"] = {
            name: sum(captions[name][file] == text for file, text in truths.items()) / len(truths) for name in MODES
        }
    for name in MODES:
        print(f"{name:45} {medians[name]:8.2f} images/s {result['ratio to paper'][name]:6.2f} x paper")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
