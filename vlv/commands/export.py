"""`vlv export`: a VLV's parts, each in its own library's format."""

from dataclasses import dataclass, field

from vlv.arguments import CommandParser
from vlv.files import atomic_folder, check_source


@dataclass
class ExportArguments:
    output: str = field(metadata={"help": "Folder to write; it must not exist yet."})


def main(argv: list[str]) -> None:
    parser = CommandParser(
        ExportArguments,
        prog="vlv export",
        description="Write each part of a VLV in its own library's format: encoder (Florence-2), decoder (Stable "
        "Diffusion), caption_head (the language model) and adapters (queries and projections).",
        epilog="example: vlv export my-vlv --output parts",
    )
    parser.add_argument("model", metavar="MODEL", help="Folder or Hub id of a VLV.")
    arguments, inputs = parser.parse(argv)
    check_source(inputs.model)
    with atomic_folder(arguments.output) as folder:
        # Imported only now, because importing torch would delay --help and the errors of wrong arguments.
        from vlv.models.export import export_parts
        from vlv.models.loading import load_whole

        parts = export_parts(*load_whole(inputs.model), folder)
    print(f"In {arguments.output}: {', '.join(parts)}.")
