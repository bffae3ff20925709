"""Loads models for the commands from a folder or the Hub, checks them, and moves them to their device."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.utils import logging

from configuration_vlv import VLVConfig
from modeling_vlv import VLVForConditionalGeneration, VLVModel
from processing_vlv import VLVProcessor
from vlv import find_bundled
from vlv.files import check_source
from vlv.models.reference import is_reference

Model = TypeVar("Model", bound=VLVModel)


def load_captioner(
    source: str | None,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    **loading: Any,
) -> tuple[VLVForConditionalGeneration, VLVProcessor]:
    """
    Load a captioner: the model without UNet and VAE, and its processor. The installed code reads the checkpoint. Code
    in the checkpoint's folder is never run.

    Args:
        source: folder or Hub id; `None` is the bundled checkpoint.
        device: a torch device, or `"auto"`: the accelerator, if there is one.
        dtype: a torch dtype, or `"auto"`: fp32 on the CPU, and the saved dtype on other devices.
        quantization: `"8bit"` or `"4bit"`: bitsandbytes quantises the caption head's weights.
        loading: arguments of `from_pretrained`, such as `device_map` and `attn_implementation`.

    Raises:
        OSError, ValueError: when there is no such model, or when it is damaged, not a VLV, or has no caption head.
    """
    source = find_captioner(source)
    if quantization is not None:
        loading["quantization_config"] = BitsAndBytesConfig(
            **{f"load_in_{quantization}": True},
            llm_int8_skip_modules=["encoder", "projection", "text_encoder", "prefix_projection", "lm_head"],
        )
        loading.setdefault("device_map", {"": find_device(device)})
    dtype = None if dtype == "auto" else getattr(torch, dtype)
    return _load(VLVForConditionalGeneration, source, device, dtype, **loading)


def find_captioner(source: str | None) -> str:
    """The folder or Hub id of a captioner. Only its config is checked; the errors are those of [`load_captioner`]."""
    source = find_bundled(source)
    if read_config(source).caption_config is None:
        raise ValueError(
            f"{source} has no caption head and cannot caption: train one with `vlv train`, or take another --model."
        )
    return source


def load_autoencoder(source: str | None, device: str = "auto", **config: Any) -> tuple[VLVModel, VLVProcessor]:
    """
    Load the whole model, including its decoder, and its processor, as [`load_captioner`] does. `config` overrides the
    checkpoint's config, as in `from_pretrained`: with `caption_config=None` the caption head is not read.
    """
    source = find_bundled(source)
    if read_config(source).decoder_config is None:
        raise ValueError(f"{source} has no diffusion decoder and cannot reconstruct: take another --model.")
    return _load(VLVModel, source, device, **config)


def load_whole(source: str | None) -> tuple[VLVModel, VLVProcessor]:
    """Load all parts that a checkpoint has, on the CPU, in the dtype that it was saved in."""
    source = find_bundled(source)
    read_config(source)
    return _load(VLVModel, source, "cpu", dtype="auto")


def read_config(source: str) -> VLVConfig:
    """The config of a VLV; raises OSError if there is none, and ValueError if it is of another model."""
    folder = Path(source)
    check_source(source)
    if not folder.exists() and "/" not in source:
        raise FileNotFoundError(f"There is no folder {source}. A model on the Hub is named user/name.")
    try:
        config = _config_dict(source)
    except OSError:
        _refuse_reference(source)
        raise
    if config.get("model_type") != VLVConfig.model_type:
        _refuse_reference(source)
        raise ValueError(
            f"{source} is not a VLV checkpoint: its config.json names the model type {config.get('model_type')!r}."
        )
    return VLVConfig.from_dict(config)


def _config_dict(source):
    folder = Path(source)
    if folder.is_file() and folder.suffix != ".json":
        raise FileNotFoundError(f"{source} is a file: give the folder of a VLV checkpoint.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{source} is not a model: there is no config.json in it.")
    try:
        return PreTrainedConfig.get_config_dict(source)[0]
    except OSError as error:
        if folder.is_dir():
            raise
        raise FileNotFoundError(
            f"There is no folder {source}, and no model of that name was found on the Hub."
        ) from error


def _refuse_reference(source):
    """Says how to bring a checkpoint of the paper's code over, where it is one."""
    if is_reference(source):
        raise ValueError(
            f"{source} is a checkpoint of the paper's code: bring it over with `vlv convert {source} --output FOLDER` "
            "and give that folder."
        )


def _load(
    model_class: type[Model], source: str, device: str, dtype: torch.dtype | str | None = None, **loading: Any
) -> tuple[Model, VLVProcessor]:
    place = find_device(device)
    dtype = dtype or (torch.float32 if place.type == "cpu" else "auto")
    model = load_weights(model_class, source, dtype=dtype, **loading)
    with _quiet_transformers():
        processor = VLVProcessor.from_pretrained(source)
    if "device_map" not in loading:
        model.to(place)
    return model.eval(), processor


def load_weights(model_class: Any, source: str, new: tuple[str, ...] = (), **loading: Any) -> Any:
    """
    `from_pretrained`, which never continues with random weights in place of missing ones.

    Args:
        model_class: a model's class, or an auto class.
        new: beginnings of the names of weights that the checkpoint need not have, or has in another size.

    Raises:
        ValueError: for weights that are missing, damaged, or of another size than the config says.
    """
    try:
        with _quiet_transformers():
            model, info = model_class.from_pretrained(
                source,
                use_safetensors=True,  # a pickle is not even opened
                ignore_mismatched_sizes=True,  # but refused below, in a sentence of our own
                output_loading_info=True,
                **loading,
            )
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"The weights of {source} cannot be read: {error}") from error
    except ImportError as error:  # bitsandbytes, flash_attn, ...: the library's sentence says how to install it
        raise ValueError(str(error)) from error
    mismatched = sorted(item for item in info["mismatched_keys"] if not item[0].startswith(new))
    if mismatched:
        name, size, expected = mismatched[0]
        raise ValueError(
            f"{source} contradicts itself: {name} is {tuple(size)} in its weights, but {tuple(expected)} by its "
            "config."
        )
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(new))
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} of the weights that its config asks for: {', '.join(missing[:3])}"
        )
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide its progress bar and its notes about weights. The important ones are raised as errors here."""
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()


def find_device(name: str) -> torch.device:
    """The device that `--device` names; `"auto"` is the accelerator, if there is one. Raises ValueError for others."""
    if name == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
