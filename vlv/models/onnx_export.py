"""The encoder half of a VLV as an ONNX file: from pixels to the prefix that the caption head continues."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from modeling_vlv import VLVModel

FILE = "encoder.onnx"


class _PrefixMaker(nn.Module):
    def __init__(self, model: VLVModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.prefix_projection(self.model.encode_context(self.model.encode(pixel_values)))


def check_onnx(model: VLVModel, source: str) -> None:
    """Raises ValueError where there is no prefix to export, or a library is missing."""
    if model.caption_head is None:
        raise ValueError(f"{source} has no caption head, and so no prefix to export: leave out --onnx.")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--onnx needs {error.name}, which is not installed: pip install 'vlv[onnx]'.") from error


def export_onnx(model: VLVModel, height: int, width: int, folder: str | Path) -> Path:
    """
    Writes `encoder.onnx`, with its weights in `encoder.onnx.data` beside it. The model becomes a float32 one.

    It reads `pixel_values` `(B, 3, height, width)`, float32, from the processor, and gives `prefix` `(B, Q, L)`,
    float32: what the caption head takes as `inputs_embeds`. B is free.

    Returns:
        The file.
    """
    file = Path(folder) / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    example = torch.zeros(2, 3, height, width)  # one image alone would be taken for a constant
    with _quiet():
        torch.onnx.export(
            _PrefixMaker(model.float().eval()),
            (example,),
            file,
            input_names=["pixel_values"],
            output_names=["prefix"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=True,
            verbose=False,
        )
    return file


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporter says about its own parts, and of torchvision, whose operators are not used."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)
