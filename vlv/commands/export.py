"""`vlv export`: a VLV's parts, each in its own library's format."""

from dataclasses import dataclass, field

from vlv.arguments import CommandParser
from vlv.files import atomic_folder, check_source


@dataclass
class ExportArguments:
    output: str = field(metadata={"help": "Folder to write; it must not exist yet."})
    onnx: bool = field(
        default=False,
        metadata={
            "help": "Also write onnx/encoder.onnx: from pixels to the prefix that the caption head continues, in "
            "float32 and for any batch (needs vlv[onnx])."
        },
    )


def main(argv: list[str]) -> None:
    parser = CommandParser(
        ExportArguments,
        prog="vlv export",
        description="Write each part of a VLV in its own library's format: encoder (Florence-2), decoder (the "
        "text-to-image model), caption_head (the language model) and adapters (queries and projections).",
        epilog="example: vlv export my-vlv --output parts",
    )
    parser.add_argument("model", metavar="MODEL", help="Folder or Hub id of a VLV.")
    arguments, inputs = parser.parse(argv)
    check_source(inputs.model)
    with atomic_folder(arguments.output) as folder:
        # Imported only now, because importing torch would delay --help and the errors of wrong arguments.
        from vlv.models.export import export_parts
        from vlv.models.loading import load_whole
        from vlv.models.onnx_export import check_onnx, export_onnx

        model, processor = load_whole(inputs.model)
        if arguments.onnx:
            check_onnx(model, inputs.model)
        parts = export_parts(model, processor, folder)
        if arguments.onnx:
            export_onnx(model, processor.image_height, processor.image_width, folder / "onnx")
            parts.append("onnx")
    print(f"In {arguments.output}: {', '.join(parts)}.")
