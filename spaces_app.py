"""The VLV app, the same file on a laptop and on a Hugging Face Space: captions, reconstructions, compositions."""

try:
    import spaces  # ZeroGPU patches torch, so it comes first
except ImportError:
    spaces = None

import os
import sys
from argparse import HelpFormatter
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path

from huggingface_hub import metadata_load
from PIL import Image
from transformers import HfArgumentParser

from vlv_app.page import Tab, build_app, launch_settings
from vlv_app.studio import Studio

HERE = Path(__file__).parent
LOCAL = ("127.0.0.1", "localhost", "::1")  # addresses that only this machine reaches
# PIL takes memory in blocks of this size. malloc gives blocks as large as this one back to the system when an image is
# done with; PIL's own 16 MB stay with the thread that read the image.
IMAGE_BLOCK = 64 * 2**20


def example_files() -> list[str]:
    """Of the Space that this file is in, or those that come with the `vlv` package."""
    folder = HERE / "examples"
    if not folder.is_dir() and (package := find_spec("vlv")):
        folder = Path(package.origin).parent / "publish" / "examples"
    suffixes = Image.registered_extensions()
    return sorted(str(file) for file in folder.glob("*") if file.suffix.lower() in suffixes)


def find_model(model: str | None = None) -> str:
    """A model's folder or id: of none, that which the Space's README names, or that which comes with `vlv`."""
    readme = HERE / "README.md"
    if model is None and readme.is_file():
        model = next(iter((metadata_load(readme) or {}).get("models") or ()), None)
    try:
        from vlv import find_bundled
    except ImportError:
        if model is None:
            raise ValueError("name a model with --model: the package with the bundled one is not installed.") from None
        return model
    return find_bundled(model)


def more_tabs(is_local: bool) -> list[Tab]:
    """The collections, where the whole `vlv` package is installed: they are captioned as `vlv caption` does."""
    if find_spec("vlv") is None:
        return []
    from vlv.collection.tab import MEGABYTES, collection_tab

    return [Tab("Collection", collection_tab(is_local), MEGABYTES)]


@dataclass
class AppArguments:
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a VLV (default: the bundled one, for drawn scenes)."}
    )
    share: bool = field(default=False, metadata={"help": "Also serve on a public link, through Gradio's servers."})
    auth: str | None = field(default=None, metadata={"help": "USER:PASSWORD that visitors must give."})

    def __post_init__(self):
        if self.auth is not None and not all(self.auth.partition(":")):
            raise ValueError("--auth wants USER:PASSWORD.")


def main(argv: list[str] | None = None, prog: str = "spaces_app.py") -> None:
    parser = HfArgumentParser(
        AppArguments,
        prog=prog,
        formatter_class=HelpFormatter,  # the defaults are told where they matter
        description="Caption, rebuild and compose images in the browser.",
        epilog="GRADIO_SERVER_NAME and GRADIO_SERVER_PORT set the address (default: 127.0.0.1, from port 7860 on).",
    )
    Image.core.set_block_size(IMAGE_BLOCK)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a pipe or a file shows the address that Gradio prints at once
    try:
        (arguments,) = parser.parse_args_into_dataclasses(argv)
        studio = Studio(find_model(arguments.model))
    except (OSError, ValueError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    on_gpu = spaces.GPU if spaces else lambda function: function
    more = more_tabs(is_local=not arguments.share and os.environ.get("GRADIO_SERVER_NAME", LOCAL[0]) in LOCAL)
    build_app(studio, example_files(), on_gpu, more).launch(
        share=arguments.share,
        auth=tuple(arguments.auth.split(":", 1)) if arguments.auth else None,
        **launch_settings(more),
    )


if __name__ == "__main__":
    main()
