"""`vlv convert`: a checkpoint of the paper's code as a VLV."""

from dataclasses import dataclass, field

from vlv.arguments import CommandParser
from vlv.files import atomic_folder, check_source


@dataclass
class ConvertArguments:
    output: str = field(metadata={"help": "Folder to write; it must not exist yet."})
    encoder: str | None = field(
        default=None,
        metadata={
            "help": "Id or folder of the Florence-2 that it started from: config, tokenizer, image settings. The "
            "default of each part is the published one of the checkpoint's size."
        },
    )
    decoder: str | None = field(
        default=None,
        metadata={
            "help": "Id or folder of its Stable Diffusion, from which a stage-2 checkpoint takes UNet and VAE. With "
            "none it becomes a captioner that cannot reconstruct, and they are not downloaded."
        },
    )
    caption_head: str | None = field(
        default=None, metadata={"help": "Id or folder of the language model that a stage-2 checkpoint started from."}
    )
    image_size: int = field(
        default=384, metadata={"help": "Side of its training images in pixels; a checkpoint does not record it."}
    )


def main(argv: list[str]) -> None:
    parser = CommandParser(
        ConvertArguments,
        prog="vlv convert",
        description="Convert a checkpoint of the paper's own code, tensor by tensor: of either stage, .bin, .pt or "
        ".safetensors, sharded or not. No code in it is run, and the report names every tensor.",
        epilog="example: vlv convert lambertxiao/Vision-Language-Vision-Captioner-Qwen2.5-3B --output vlv-3b",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="File, folder, index of shards, or Hub id.")
    arguments, inputs = parser.parse(argv)
    check_source(inputs.checkpoint)
    for option in ("encoder", "decoder", "caption_head"):
        check_source(getattr(arguments, option), option)
    with atomic_folder(arguments.output) as folder:
        # Imported only now, because importing torch would delay --help and the errors of wrong arguments.
        from vlv.models.convert import convert_checkpoint

        model, processor, report = convert_checkpoint(
            inputs.checkpoint,
            arguments.encoder,
            arguments.decoder,
            arguments.caption_head,
            arguments.image_size,
        )
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    print(report)
    print(f"The model is in {arguments.output}.")
