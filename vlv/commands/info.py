"""`vlv info`: what a VLV is made of."""

from vlv.arguments import CommandParser


def main(argv: list[str]) -> None:
    parser = CommandParser(
        prog="vlv info",
        description="Print the parts of a VLV with their parameters, and their bytes in fp32 and bf16. Only the "
        "config is read, no weights.",
        epilog="example: vlv info my-vlv",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL_OR_CONFIG",
        help="Folder or Hub id of a VLV, or a config.json (default: the bundled vlv-tiny).",
    )
    (inputs,) = parser.parse(argv)

    # Imported only now, because importing torch would delay --help and the errors of wrong arguments.
    from vlv import tiny_checkpoint
    from vlv.models.info import count_parts, format_parts
    from vlv.models.loading import read_config

    print(format_parts(count_parts(read_config(inputs.model or tiny_checkpoint()))))
