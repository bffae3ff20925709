"""Reads checkpoints of the paper's own code, and tells them from others, by the names of their tensors."""

import json
import pickle
import zipfile
from collections.abc import Collection, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

# What a folder is searched for, in this order.
CHECKPOINT_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "model.pt",
)
# The queries, in a checkpoint of stage 1 and of stage 2. Nothing but the paper's code calls a tensor so.
QUERIES = ("query_embed", "VLV_model.query_embed")


def is_reference(source: str) -> bool:
    """Whether a file, a folder or a repo on the Hub holds a checkpoint of the paper's code. No weights are read."""
    path = Path(source)
    try:
        names = _names(_find(path)) if path.exists() else _names_on_the_hub(source)
    except (OSError, ValueError):
        return False
    return names is not None and holds_queries(names)


def holds_queries(names: Collection[str]) -> bool:
    return any(name in names for name in QUERIES)


def not_the_papers(source: str, names: Collection[str]) -> str:
    """The sentence that refuses another model, or another file."""
    if "queries" in names:
        return f"{source} is a VLV already: there is nothing to convert."
    some = ", ".join([*names][:3]) or "nothing"
    return f"{source} is not a checkpoint of the paper's code: it has no query_embed, but {some}, ..."


def read_checkpoint(checkpoint: str) -> tuple[dict[str, torch.Tensor], Path]:
    """
    The tensors of a checkpoint, mapped into memory rather than read, and the folder that they lie in.

    Args:
        checkpoint: a .bin, .pt or .safetensors file, the index of a sharded one, a folder of these, or a Hub id.

    Raises:
        OSError: there is no such checkpoint, or a shard of it is missing.
        ValueError: a file is damaged, reading it would run code, or it is not a checkpoint of the paper's code.
    """
    path = Path(checkpoint)
    path = _find(path if path.exists() else _download(checkpoint))
    tensors = {}
    for file in _files(path):
        tensors.update(_read_file(file))
    if not holds_queries(tensors):
        raise ValueError(not_the_papers(checkpoint, tensors))
    return tensors, path.parent


# ---- files -------------------------------------------------------------------------------------------------


def _find(path):
    """The file of a checkpoint, or the index of a sharded one."""
    if not path.is_dir():
        return path
    found = [path / name for name in CHECKPOINT_NAMES if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{path} holds no checkpoint: none of {', '.join(CHECKPOINT_NAMES)} is in it.")
    return found[0]


def _files(path):
    """The file itself, or the shards of an index."""
    if not path.name.endswith(".index.json"):
        return [path]
    shards = sorted(set(_weight_map(path).values()))
    for shard in shards:
        if not (path.parent / shard).is_file():
            raise FileNotFoundError(f"{path} names {shard}, but there is no such file beside it.")
    return [path.parent / shard for shard in shards]


def _names(path):
    """The names of the tensors in a file, or in the shards of an index."""
    if path.name.endswith(".index.json"):
        return _without_wrapper(_weight_map(path))
    if path.suffix != ".safetensors":
        return _read_file(path).keys()
    try:
        with safe_open(path, framework="pt") as file:
            return _without_wrapper(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error


def _weight_map(index):
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not the index of a sharded checkpoint: it has no weight_map.") from error


def _without_wrapper(names):
    return [name.removeprefix("module.") for name in names]


def _read_file(path):
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:  # Only files in torch's zip format can be mapped into memory; the old format is read.
            content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read safely: it is damaged, or a pickle that holds more than tensors and runs code."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines() or ["it ends too soon"]
        raise ValueError(f"{path} is damaged or cut short: {reason[0]}") from error
    if isinstance(content, Mapping):
        content = content.get("model_state_dict", content)
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: something other than named tensors is in it.")
    return dict(zip(_without_wrapper(content), content.values(), strict=True))


# ---- the Hub -----------------------------------------------------------------------------------------------


def _names_on_the_hub(repo_id):
    """The names of a repo's tensors, from the headers of its files; `None` where only whole files would tell."""
    name = _find_on_the_hub(repo_id)
    with _asking(repo_id):
        if name.endswith(".index.json"):
            return _names(Path(hf_hub_download(repo_id, name)))
        if name.endswith(".safetensors"):
            return _without_wrapper(HfApi().parse_safetensors_file_metadata(repo_id, name).tensors)
    return None


def _find_on_the_hub(repo_id):
    with _asking(repo_id):
        files = HfApi().list_repo_files(repo_id)
    found = [name for name in CHECKPOINT_NAMES if name in files]
    if not found:
        raise ValueError(f"{repo_id} holds no checkpoint: none of {', '.join(CHECKPOINT_NAMES)} is in it.")
    return found[0]


def _download(repo_id):
    """The folder of a repo's checkpoint and tokenizer. What is seen to be another model is not downloaded."""
    suffixes = [".safetensors", ".bin", ".pt"]
    if not constants.HF_HUB_OFFLINE:
        names = _names_on_the_hub(repo_id)
        if names is not None and not holds_queries(names):
            raise ValueError(not_the_papers(repo_id, names))
        suffixes = [Path(_find_on_the_hub(repo_id).removesuffix(".index.json")).suffix]
    with _asking(repo_id):
        return Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.txt", *(f"*{it}" for it in suffixes)]))


@contextmanager
def _asking(repo_id):
    try:
        yield
    except (RepositoryNotFoundError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"There is no file or folder {repo_id}, and no model of that name was found on the Hub."
        ) from error
    except (OSError, HTTPError, SafetensorsParsingError) as error:
        raise OSError(f"{repo_id} cannot be read on the Hub: {' '.join(str(error).split())}") from error
