"""
VLV, the Vision-Language-Vision auto-encoder (arXiv 2507.07104): images to captions and back.

Importing `vlv` is cheap: each public name below is imported, and PyTorch with it, when it is first used. The model
itself is in the top-level modules whose names end in `_vlv`, which every Hub repo also holds. This package holds the
tools around the model.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from configuration_vlv import VLVConfig
    from modeling_vlv import VLVForConditionalGeneration, VLVModel
    from processing_vlv import VLVProcessor
    from vlv.models.loading import load_autoencoder, load_captioner

__version__ = "0.2.0"

__all__ = [
    "VLVConfig",
    "VLVForConditionalGeneration",
    "VLVModel",
    "VLVProcessor",
    "bundled_checkpoint",
    "load_autoencoder",
    "load_captioner",
]

# The module of each public name that is imported when it is first used.
_MODULES = {
    "VLVConfig": "configuration_vlv",
    "VLVForConditionalGeneration": "modeling_vlv",
    "VLVModel": "modeling_vlv",
    "VLVProcessor": "processing_vlv",
    "load_autoencoder": "vlv.models.loading",
    "load_captioner": "vlv.models.loading",
}


_CHECKPOINTS = Path(__file__).parent / "checkpoints"
BUNDLED = "vlv-emoji"  # the checkpoint of every command that names no model


def bundled_checkpoint(name: str = BUNDLED) -> str:
    """
    Folder of a small trained checkpoint that ships with this package.

    Raises:
        ValueError: when no checkpoint of that name ships with it.
    """
    if name not in (names := _bundled()):
        raise ValueError(f"There is no bundled checkpoint {name!r}; there are: {', '.join(names)}.")
    return str(_CHECKPOINTS / name)


def find_bundled(source: str | None) -> str:
    """The folder of the bundled checkpoint that is named, or of `BUNDLED`; any other folder or id as it is."""
    source = source or BUNDLED
    return bundled_checkpoint(source) if source in _bundled() and not Path(source).is_dir() else source


def _bundled() -> list[str]:
    return sorted(folder.name for folder in _CHECKPOINTS.glob("vlv-*"))


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
