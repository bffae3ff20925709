"""
Saves a tiny checkpoint, and what it answers, into a folder named after the installed transformers.

`test_model_files.py` loads them all under whichever release the tests run with:

    python tests/data/saved/save.py
"""

import json
import sys
from pathlib import Path

import torch
import transformers

TESTS = Path(__file__).parents[2]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import tiny  # noqa: E402


def main():
    folder = Path(__file__).parent / f"transformers-{transformers.__version__}"
    parts = tiny.decoder_config()
    parts["unet"] |= {"block_out_channels": [8, 16], "norm_num_groups": 4}  # small files
    model = tiny.model(decoder_config=parts).half()
    model.save_pretrained(folder)
    processor = tiny.processor()
    processor.save_pretrained(folder)
    for code in folder.glob("*.py"):  # it is the repository's own code that is tested on the checkpoint
        code.unlink()

    model = model.float()
    pixel_values = processor(images=tiny.images(3))["pixel_values"]
    captions = processor.batch_decode(model.generate(pixel_values, max_new_tokens=10, do_sample=False))
    noise = torch.Generator().manual_seed(0)
    pictures = model.reconstruct(pixel_values, num_inference_steps=2, generator=noise, output_type="pt")
    expected = {
        "captions": captions,
        "mean_colours": pictures.mean(dim=(2, 3)).tolist(),
        "decoder_ids": processor.decoder_tokenizer("a cat").input_ids,
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
