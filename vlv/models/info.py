"""Counts the parameters of a VLV's parts from its config, for `vlv info`."""

from collections import Counter
from dataclasses import dataclass

import torch

from configuration_vlv import VLVConfig
from modeling_vlv import VLVModel


@dataclass(frozen=True)
class Part:
    """A part of a model, with the `bytes` of its weights in each of the dtypes."""

    name: str
    parameters: int
    bytes: dict[torch.dtype, int]


def count_parts(config: VLVConfig, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> list[Part]:
    """The parts of the model that a config describes. No weights are allocated, and tied weights count once."""
    with torch.device("meta"):
        model = VLVModel(config)
    model.tie_weights()
    parameters: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parameters[_part_name(name)] += parameter.numel()
    return [
        Part(name, count, {dtype: count * dtype.itemsize for dtype in dtypes}) for name, count in parameters.items()
    ]


def _part_name(parameter_name):
    """As `VLVModel.named_parts`: the first level, and Florence-2's vision tower, projector and language model."""
    parts = parameter_name.split(".")
    if parts[0] != "encoder":
        return parts[0]
    return ".".join(parts[:2])


def format_parts(parts: list[Part]) -> str:
    """A table of them, with their sum."""
    dtypes = list(parts[0].bytes)
    total = Part("total", sum(p.parameters for p in parts), {d: sum(p.bytes[d] for p in parts) for d in dtypes})
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    rows = [("part", "parameters", *names)]
    rows += [(p.name, f"{p.parameters:,}", *(f"{p.bytes[d] / 1e6:,.1f} MB" for d in dtypes)) for p in (*parts, total)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
