"""
The code of a user of the Hub, in a process where only the dependencies of this package are installed.

`test_entry_points.py` runs it and checks the answers:

    python tests/clean_environment.py REPO PICTURES OUTPUT [--installed] ENTRY_POINT...

REPO is a folder or an id. PICTURES is a folder with 0.png, 1.png, 2.png, clear.png and broken.png. OUTPUT is a folder
for answers.json, {entry_point: {"answer": ...} or {"error": traceback}}, and for saved models. With --installed, the
package is installed too, and is imported first.
"""

import functools
import http.server
import importlib.abc
import json
import sys
import threading
import traceback
from pathlib import Path

HIDDEN = {"vlv", *(file.stem for file in Path(__file__).parents[1].glob("*_vlv.py"))}


class NotInstalled(importlib.abc.MetaPathFinder):
    """Hides this package in any kind of installation, because it comes before every other finder."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if "--installed" in sys.argv:
    sys.argv.remove("--installed")
    import modeling_vlv  # noqa: F401
else:
    sys.meta_path.insert(0, NotInstalled())

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()

ENTRY_POINTS = {}
GREEDY = {"max_new_tokens": 10, "do_sample": False}
NAMES = ["0.png", "1.png", "2.png"]


def entry_point(function):
    ENTRY_POINTS[function.__name__] = function
    return function


@functools.cache
def captioner(repo):
    return pipeline("image-to-text", model=repo, trust_remote_code=True)


@functools.cache
def continuer(repo):
    return pipeline("image-text-to-text", model=repo, trust_remote_code=True)


@functools.cache
def rebuilder(repo):
    return pipeline("image-to-image", model=repo, trust_remote_code=True)


def save_weights(model, path):
    save_file({name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}, path)


def frozen(model):
    return sorted({name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad})


def texts(answers):
    """The captions of the answers, in the same nested lists."""
    return [texts(answer) if isinstance(answer, list) else answer["generated_text"] for answer in answers]


# ---- Auto classes ------------------------------------------------------------------------------------------


@entry_point
def package_is_hidden(repo, pictures, output):
    found = []
    for name in sorted(HIDDEN):
        try:
            __import__(name)
            found.append(name)
        except ModuleNotFoundError:
            pass
    return found


@entry_point
def auto_config(repo, pictures, output):
    config = AutoConfig.from_pretrained(repo, trust_remote_code=True)
    return {
        "class": type(config).__name__,
        "num_queries": config.num_queries,
        "vocab_size": config.get_text_config(decoder=True).vocab_size,
    }


@entry_point
def auto_processor(repo, pictures, output):
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    inputs = processor(images=[pictures / name for name in NAMES], text=["a cat", "ox", ""], return_labels=True)
    return {
        "class": type(processor).__name__,
        "pixel_values": inputs["pixel_values"].tolist(),
        "labels": inputs["labels"].tolist(),
        "decoder_ids": processor.decoder_tokenizer("a cat").input_ids,
    }


@entry_point
def auto_model(repo, pictures, output):
    """Captions, a reconstruction and a training step's loss."""
    model, info = AutoModel.from_pretrained(repo, trust_remote_code=True, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    inputs = processor(images=[pictures / name for name in NAMES])
    colours = None
    if model.unet is not None:
        colours = model.reconstruct(
            **inputs, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).mean(dim=(2, 3))
        colours = colours.tolist()
    labels = processor(text=["a cat"] * 3, return_labels=True)
    save_weights(model, output / "weights.safetensors")
    return {
        "class": type(model).__name__,
        "frozen": frozen(model),
        "info": {name: sorted(keys) for name, keys in info.items() if keys},
        "captions": processor.batch_decode(model.generate(**inputs, **GREEDY)),
        "colours": colours,
        "loss": model(**inputs, **labels).loss.item(),
    }


@entry_point
def auto_model_for_image_text_to_text(repo, pictures, output):
    model, info = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    inputs = processor(images=[pictures / name for name in NAMES])
    return {
        "class": type(model).__name__,
        "parts": sorted({name.split(".")[0] for name in model.state_dict()}),
        "frozen": frozen(model),
        "info": {name: sorted(keys) for name, keys in info.items() if keys},
        "captions": processor.batch_decode(model.generate(**inputs, **GREEDY)),
    }


# ---- pipeline("image-to-text") -----------------------------------------------------------------------------


@entry_point
def one_picture(repo, pictures, output):
    """Each kind of input for one picture gives one row."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=pictures)
    handler.log_message = lambda *_: None
    path = pictures / "0.png"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, open(path, "rb") as file:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sources = {
            "str": str(path),
            "path": path,
            "url": f"http://127.0.0.1:{server.server_port}/0.png",
            "bytes": path.read_bytes(),
            "file": file,
            "pil": Image.open(path),
            "numpy": np.asarray(Image.open(path)),
        }
        answers = {kind: captioner(repo)(source, **GREEDY) for kind, source in sources.items()}
        server.shutdown()
    return answers


@entry_point
def several_pictures(repo, pictures, output):
    """Each kind of input for several pictures gives one answer per picture, which is a list of rows."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature
    from transformers.pipelines.pt_utils import KeyDataset

    paths = [str(pictures / name) for name in NAMES]
    dataset = Dataset.from_dict({"image": paths}, features=Features({"image": ImageFeature()}))
    plain = Dataset.from_dict({"file": paths}, features=Features({"file": Value("string")}))
    sources = {
        "list": lambda: paths,
        "mixed list": lambda: [paths[0], Image.open(paths[1]), Path(paths[2]).read_bytes()],
        "tuple": lambda: tuple(paths),
        "generator": lambda: (path for path in paths),
        "column": lambda: dataset["image"],
        "key dataset": lambda: KeyDataset(dataset, "image"),
        "column of paths": lambda: plain["file"],
    }
    answers = {}
    for batch_size in (None, 1, 2, 5):
        for kind, source in sources.items():
            answer = captioner(repo)(source(), batch_size=batch_size, **GREEDY)
            answers[f"{kind}, {batch_size}"] = {"type": type(answer).__name__, "texts": texts(list(answer))}
    return answers


@entry_point
def generation_arguments(repo, pictures, output):
    paths = [str(pictures / name) for name in NAMES]
    captions = captioner(repo)
    return {
        "max_new_tokens": texts(captions(paths, max_new_tokens=4, do_sample=False)),
        "generate_kwargs": texts(captions(paths, generate_kwargs={"max_new_tokens": 4, "do_sample": False})),
        "num_beams": texts(captions(paths, num_beams=3, **GREEDY)),
        "num_beams, batched": texts(captions(paths, num_beams=3, batch_size=3, **GREEDY)),
        "num_return_sequences": texts(captions(paths, num_beams=3, num_return_sequences=2, batch_size=2, **GREEDY)),
        "one, num_return_sequences": texts(captions(paths[0], num_beams=3, num_return_sequences=2, **GREEDY)),
        "crop": texts(captions(paths, crop="center", **GREEDY)),
        "given at the start": texts(
            pipeline("image-to-text", model=repo, trust_remote_code=True, max_new_tokens=4, do_sample=False)(paths)
        ),
    }


@entry_point
def dtype_and_device(repo, pictures, output):
    paths = [str(pictures / name) for name in NAMES]
    answers = {}
    for name, arguments in {
        "bfloat16": {"dtype": torch.bfloat16},
        "float16": {"dtype": "float16"},
        "device": {"device": "cpu"},
        "device_map": {"device_map": "auto"},
    }.items():
        captions = pipeline("image-to-text", model=repo, trust_remote_code=True, **arguments)
        answers[name] = {
            "dtype": str(captions.model.dtype),
            "texts": texts(captions(paths, batch_size=2, **GREEDY)),
        }
    return answers


@entry_point
def an_unreadable_picture(repo, pictures, output):
    paths = [str(pictures / name) for name in ("0.png", "broken.png", "2.png")]
    answers = {str(size): captioner(repo)(paths, batch_size=size, **GREEDY) for size in (1, 3)}
    answers["generator"] = list(captioner(repo)((path for path in paths), batch_size=2, **GREEDY))
    try:
        captioner(repo)(paths[1])
    except ValueError as error:
        answers["alone"] = str(error)
    try:
        captioner(repo)(str(pictures / "missing.png"))
    except FileNotFoundError as error:
        answers["missing"] = str(error)
    return answers


# ---- pipeline("image-text-to-text") ------------------------------------------------------------------------


@entry_point
def image_text_to_text(repo, pictures, output):
    paths = [str(pictures / name) for name in NAMES]

    def write(*args, generate_kwargs=None, **kwargs):
        return continuer(repo)(*args, **kwargs, generate_kwargs={**GREEDY, **(generate_kwargs or {})})

    rows = [{"images": path, "text": text} for path, text in zip(paths, ["a", "two small", ""], strict=True)]
    return {
        "no text": write(images=paths[0], text=""),
        "text": write(images=paths[0], text="a"),
        "new text": write(images=paths[0], text="a", return_full_text=False),
        "lists": write(images=paths, text=["a", "two small", ""]),
        "rows": list(write(row for row in rows)),
        "rows, batched": list(write((row for row in rows), batch_size=3)),
        "pil": write(images=Image.open(paths[0]), text="a"),
        "several": write(
            images=paths[0],
            text="a",
            generate_kwargs={"num_beams": 3, "num_return_sequences": 2},
        ),
        "transparent": write(images=str(pictures / "clear.png"), text=""),
        "transparent, image-to-text": captioner(repo)(str(pictures / "clear.png"), **GREEDY),
    }


# ---- pipeline("image-to-image") ----------------------------------------------------------------------------


@entry_point
def image_to_image(repo, pictures, output):
    paths = [str(pictures / name) for name in NAMES]
    rebuild = functools.partial(rebuilder(repo), num_inference_steps=2, seed=3)
    one, several, batched = rebuild(paths[0]), rebuild(paths), rebuild(paths, batch_size=3)
    broken = rebuild([paths[0], str(pictures / "broken.png")], batch_size=2)
    colours = [np.asarray(picture).astype(int).tolist() for picture in (one, *several, *batched, broken[0])]
    unguided = rebuild(paths[0], guidance_scale=1.0)
    return {
        "size": one.size,
        "one": colours[0],
        "several": colours[1:4],
        "batched": colours[4:7],
        "beside a broken one": colours[7],
        "broken": broken[1],
        "unguided": np.asarray(unguided).astype(int).tolist(),
    }


# ---- saving again ------------------------------------------------------------------------------------------


@entry_point
def save_again(repo, pictures, output):
    """Models and pipelines that were loaded from a repo are saved as complete repos."""
    AutoModel.from_pretrained(repo, trust_remote_code=True).save_pretrained(output / "again")
    AutoProcessor.from_pretrained(repo, trust_remote_code=True).save_pretrained(output / "again")
    captions = pipeline("image-to-text", model=str(output / "again"), trust_remote_code=True)
    return texts(captions([str(pictures / name) for name in NAMES], **GREEDY))


@entry_point
def save_a_captioner_again(repo, pictures, output):
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
    model.save_pretrained(output / "captioner")


@entry_point
def save_a_pipeline_again(repo, pictures, output):
    captioner(repo).save_pretrained(output / "pipeline")
    captions = pipeline("image-to-text", model=str(output / "pipeline"), trust_remote_code=True)
    return texts(captions([str(pictures / name) for name in NAMES], **GREEDY))


def main(repo, pictures, output, *entry_points):
    answers = {}
    for name in entry_points:
        try:
            answers[name] = {"answer": ENTRY_POINTS[name](repo, Path(pictures), Path(output))}
        except Exception:
            answers[name] = {"error": traceback.format_exc()}
    (Path(output) / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
