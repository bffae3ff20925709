"""
Loads a repo as a Hub user does, who has transformers, diffusers and torch, but not this package. It runs as a script:

    python -P clean_environment.py FOLDER REPORT.json

It loads the repo in FOLDER in every documented way, and writes the results to REPORT.json.
"""

import json
import sys
from pathlib import Path


class Absent:
    """An import hook that hides the package and its top-level modules, which may be installed in this Python."""

    def find_spec(self, name, path=None, target=None):
        module = name.partition(".")[0]
        if module == "vlv" or module.endswith("_vlv"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(folder: str, report: str) -> None:
    sys.meta_path.insert(0, Absent())
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

    on_cpu = not torch.accelerator.is_available()
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    dtype = torch.float32 if on_cpu else "auto"
    trusted = {"trust_remote_code": True}
    settings = {"max_new_tokens": 300, "do_sample": False}
    images = sorted(str(file) for file in Path(folder, "samples").glob("*.png") if not file.stem.endswith("-rebuilt"))

    config = AutoConfig.from_pretrained(folder, **trusted)
    processor = AutoProcessor.from_pretrained(folder, **trusted)
    captions = {}
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        model = auto_class.from_pretrained(folder, dtype=dtype, **trusted).to(device).eval()
        inputs = [processor(images=image).to(device) for image in images]
        captions[auto_class.__name__] = [
            processor.batch_decode(model.generate(**each, **settings))[0] for each in inputs
        ]
    place = {"dtype": dtype, "device": device, **trusted}
    captioner = pipeline("image-to-text", model=folder, **place)
    captions["image-to-text"] = [captioner(image, **settings)[0]["generated_text"] for image in images]
    captioner = pipeline("image-text-to-text", model=folder, **place)
    captions["image-text-to-text"] = [
        captioner(images=image, text="", generate_kwargs=settings)[0]["generated_text"].strip() for image in images
    ]
    if config.decoder_config is not None:
        rebuild = pipeline("image-to-image", model=folder, **place)
        for image in images:
            rebuild(image, seed=0).save(Path(report).parent / Path(image).name)
    Path(report).write_text(json.dumps(captions))


if __name__ == "__main__":
    main(*sys.argv[1:])
