"""What `vlv train` can train, one file per stage."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlv.stages.base import Stage

# Where each stage's class lives; a stage is imported when it runs, so that none pays for the others' libraries.
STAGES = {
    "vae": ("vlv.stages.vae", "VAEStage"),
    "teacher": ("vlv.stages.teacher", "TeacherStage"),
    "encoder": ("vlv.stages.encoder", "EncoderStage"),
    "language": ("vlv.stages.language", "LanguageStage"),
    "autoencode": ("vlv.stages.autoencode", "AutoencodeStage"),
    "caption": ("vlv.stages.caption", "CaptionStage"),
}


def stage_class(name: str) -> type["Stage"]:
    """The class of a stage; raises ValueError for a name that is none."""
    if name not in STAGES:
        raise ValueError(f"There is no stage '{name}'; a recipe's stage is one of: {', '.join(STAGES)}.")
    module, attribute = STAGES[name]
    return getattr(import_module(module), attribute)
