"""The stages of `vlv train`: those of this package by name, or a user's own class."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlv.training.stage import Stage

# The module and class of each stage. A stage is imported only when it runs, without the libraries of other stages.
STAGE_CLASSES = {
    "vae": "vlv.tiny.vae:VAEStage",
    "teacher": "vlv.tiny.teacher:TeacherStage",
    "flow_teacher": "vlv.tiny.flow_teacher:FlowTeacherStage",
    "encoder": "vlv.tiny.encoder:EncoderStage",
    "language": "vlv.tiny.language:LanguageStage",
    "autoencode": "vlv.training.autoencode:AutoencodeStage",
    "caption": "vlv.training.caption:CaptionStage",
}


def stage_class(name: str) -> type["Stage"]:
    """
    The class of a stage.

    Args:
        name: one of `STAGE_CLASSES`, or `package.module:Class` for a user's own subclass of `Stage`.

    Raises:
        ValueError: when there is no such stage.
    """
    place = STAGE_CLASSES.get(name, str(name))
    module, colon, attribute = place.partition(":")
    if not colon:
        raise ValueError(
            f"There is no stage '{name}'; a recipe's stage is one of {', '.join(STAGE_CLASSES)}, or a class of your"
            " own as package.module:Class."
        )
    if not attribute or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"The stage '{name}' cannot be imported: name a class as package.module:Class.")
    try:
        found = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"The stage '{name}' cannot be imported: {error}. Install its package, or put its folder on PYTHONPATH."
        ) from error
    except AttributeError as error:
        raise ValueError(f"The stage '{name}' cannot be imported: {error}.") from error

    from vlv.training.stage import Stage

    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise ValueError(f"The stage '{name}' is not a subclass of vlv.training.stage.Stage.")
    return found
