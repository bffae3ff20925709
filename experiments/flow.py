"""
What the second tiny teacher draws, and what a stage 1 through it rebuilds:

    python -m experiments.flow TEACHER [--stage1 MODEL] [--num 200]

TEACHER is what `vlv train tiny/flow_teacher` wrote, MODEL a VLV that was trained with it.
"""

import argparse
import json

import torch
from diffusers import StableDiffusion3Pipeline

from experiments.scoring import encode, rebuild, scores
from vlv.models.loading import load_whole
from vlv.scenes import sample_picture


def drawn(teacher: str, num: int) -> dict[str, dict]:
    """Scores of pictures that the teacher draws from the true captions of test scenes."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(teacher, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    scenes = [sample_picture("test", index)[1] for index in range(num)]
    pictures = []
    for start in range(0, num, 50):
        batch = scenes[start : start + 50]
        pictures += pipeline(
            [scene.caption for scene in batch],
            num_inference_steps=8,
            guidance_scale=2.0,
            height=32,
            width=32,
            max_sequence_length=0,
            generator=[torch.Generator().manual_seed(start + number) for number in range(len(batch))],
        ).images
    return scores(pictures, scenes)


def rebuilt(model: str, num: int) -> dict[str, dict[str, dict]]:
    """Scores of test scenes rebuilt from their own embeddings, and from those of another scene: the floor."""
    vlv, processor = load_whole(model)
    pictures, scenes = zip(*(sample_picture("test", index) for index in range(num)), strict=True)
    embeds = encode(vlv.float().eval(), processor, pictures)
    sides = {"its own": embeds, "another image's": embeds.roll(1, 0)}
    return {name: scores(rebuild(vlv, side), scenes) for name, side in sides.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--stage1")
    parser.add_argument("--num", type=int, default=200)
    arguments = parser.parse_args()
    found = {"drawn from true captions": drawn(arguments.teacher, arguments.num)}
    if arguments.stage1:
        found["rebuilt"] = rebuilt(arguments.stage1, arguments.num)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
