"""The model card: a template, filled with what the checkpoint itself records."""

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

# Of the pretrained parts that a VLV is usually made of; of any other the card links the page.
LICENSES = {
    "florence-community/Florence-2-base": "MIT",
    "florence-community/Florence-2-large": "MIT",
    "microsoft/Florence-2-base": "MIT",
    "microsoft/Florence-2-large": "MIT",
    "stabilityai/stable-diffusion-2-1-base": "CreativeML Open RAIL++-M",
    "Qwen/Qwen2.5-0.5B": "Apache-2.0",
    "Qwen/Qwen2.5-1.5B": "Apache-2.0",
    "Qwen/Qwen2.5-3B": "Qwen Research License (non-commercial)",
}


def pretrained_parts(config: VLVConfig) -> dict[str, str | None]:
    """Which model of the Hub each part was made from, as the config records it; `None` where it records none."""
    decoder = config.decoder_config or {"unet": {}, "vae": {}}
    origins = {
        "encoder": config.encoder_config._name_or_path,
        "text_encoder": config.text_encoder_config._name_or_path,
        "unet": decoder["unet"].get("_name_or_path"),
        "vae": decoder["vae"].get("_name_or_path"),
        "caption_head": config.caption_config and config.caption_config._name_or_path,
    }
    return {part: origin if _is_hub_id(origin) else None for part, origin in origins.items()}


def weights_license(config: VLVConfig, license: str | None) -> str:
    """
    The licence that is asked for; apache-2.0 where none is and every part was trained from nothing.

    Raises:
        ValueError: when there are pretrained parts and no `license` is given.
    """
    origins = sorted({origin for origin in pretrained_parts(config).values() if origin})
    if license is None and origins:
        raise ValueError(
            f"The weights contain {', '.join(origins)}: name with --license what their licences allow, such as "
            "openrail++ or other."
        )
    return license or "apache-2.0"


def model_card(folder: Path, repo_id: str, model: VLVModel, samples: Sequence[Sample], license: str) -> ModelCard:
    """
    The card of the repo in `folder`.

    Args:
        folder: holds `results.json`, `training.json` and `training/STAGE/training.json`, where there are any.
        repo_id: user/name.
        model: what was saved there.
        samples: pictures, their captions and reconstructions, in `samples/`.
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
    if model.unet is not None and size is None:
        size = model.unet.config.sample_size * 2 ** (len(model.vae.config.block_out_channels) - 1)
    processor = _read(folder / "processor_config.json")
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        config=config,
        rebuilds=model.unet is not None,
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


# The rest of what an evaluation measures on drawn scenes are the ceilings and floors beside them.
_OF_THE_MODEL = ("captions", "reconstruction", "caption_to_image", "questions")


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _parts(model):
    """Each part: what it is, how large, what it was made from and under which licence."""
    origins = pretrained_parts(model.config)
    parts = [
        ("encoder", "Florence-2", [model.encoder], origins["encoder"]),
        ("queries and projections", "MLPs", [model.projection, model.prefix_projection], None),
        ("text encoder", "CLIP", [model.text_encoder], origins["text_encoder"]),
        ("caption head", model.config.caption_config.model_type, [model.caption_head], origins["caption_head"]),
    ]
    if model.unet is not None:
        parts.insert(3, ("decoder", "UNet", [model.unet], origins["unet"]))
        parts.insert(4, ("decoder", "VAE", [model.vae], origins["vae"]))
    return [
        {
            "role": role,
            "architecture": architecture,
            "parameters": sum(parameter.numel() for module in modules for parameter in module.parameters())
            + (model.queries.numel() if role.startswith("queries") else 0),
            "origin": origin,
            "link": origin and f"[{origin}](https://huggingface.co/{origin})",
            "license": origin and LICENSES.get(origin, "see its page"),
        }
        for role, architecture, modules, origin in parts
    ]


def _is_hub_id(name):
    """Whether it is user/name, and no folder of this machine."""
    return bool(name) and name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()


def _metrics(results):
    """What was measured, one dictionary each; their names are `what/images/score`."""
    return [
        {**dict(zip(("what", "images", "score"), name.split("/"), strict=True)), **measured}
        for name, measured in results.get("metrics", {}).items()
    ]


def _eval_result(metric, results):
    """For the metadata; what was measured on no data set was measured on drawn scenes, whose images are a split."""
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
    """What each training recorded. A training comes after those whose output folders its recipe names."""
    files = [*folder.glob("training/*/training.json"), *folder.glob("training.json")]
    records = [{**_read(file), "file": file.relative_to(folder).as_posix()} for file in files]
    for record in records:
        # Paths of the machine it ran on, and whatever was left alone, tell a reader nothing.
        recipe = {
            name: value for name, value in record["recipe"].items() if value is not None and name != "output_dir"
        }
        record["yaml"] = yaml.safe_dump(recipe, sort_keys=False).strip()
    records.sort(
        key=lambda record: (record["file"] == "training.json", record["file"])
    )  # the last training is at the top
    made = {record["recipe"].get("output_dir"): number for number, record in enumerate(records)}
    starts = {
        number: {made[v] for v in record["recipe"].values() if isinstance(v, str) and made.get(v, number) != number}
        for number, record in enumerate(records)
    }
    try:
        return [records[number] for number in TopologicalSorter(starts).static_order()]
    except CycleError:  # trained back and forth between two folders: no order is the right one
        return records


def _datasets(trainings):
    """What the recipes trained on, where that is a data set of the Hub."""
    return sorted({record["recipe"]["dataset"] for record in trainings if _is_hub_id(record["recipe"].get("dataset"))})


def _command(repo_id, results):
    """What measures the same again: on drawn scenes unless the results name a data set."""
    settings = {name: value for name, value in results.items() if name not in ("metrics", "commit", "versions")}
    if "dataset" in results:
        settings["metrics"] = ",".join(dict.fromkeys(f"{m['what']}/{m['score']}" for m in _metrics(results)))
    words = ["vlv evaluate", f"--model {repo_id}"]
    for name, value in settings.items():
        words.append(" ".join([f"--{name}", *map(str, value if isinstance(value, list) else [value])]))
    return " ".join(words)
