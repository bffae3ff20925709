"""The workbench around VLV: data, training, evaluation, batch captioning and the `vlv` command.

The model itself is in the top-level modules `configuration_vlv`, `modeling_vlv`, `processing_vlv` and `pipeline_vlv`.
"""

from pathlib import Path

__version__ = "0.1.0"


def tiny_checkpoint() -> str:
    """Folder of `vlv-tiny`, the small trained checkpoint that ships with this package."""
    return str(Path(__file__).parent / "checkpoints" / "vlv-tiny")
