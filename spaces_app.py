"""The VLV app, the same file on a laptop and on a Hugging Face Space: captions, reconstructions, compositions."""

try:
    import spaces  # ZeroGPU patches torch, so it comes first
except ImportError:
    spaces = None

import inspect
import sys
from argparse import HelpFormatter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

import gradio as gr
import torch
from huggingface_hub import metadata_load
from PIL import Image
from transformers import AutoModel, AutoProcessor, HfArgumentParser, TextIteratorStreamer

HERE = Path(__file__).parent
MAX_FILE_SIZE = "20mb"
CONCURRENCY = 2  # one request's file is read and its answer sent while another one's is computed
SHOWN_PIXELS = 768  # of the longer side of an original on the page
# PIL takes memory in blocks of this size. malloc gives blocks as large as this one back to the system when an image is
# done with; PIL's own 16 MB stay with the thread that read the image.
IMAGE_BLOCK = 64 * 2**20
FRAME = 300  # height of a picture's frame on the page, in pixels

INTRODUCTION = """
# Vision · Language · Vision
A VLV reads an image into a few *caption embeddings*, vectors where a text-to-image model expects words.
A language model writes them down as a caption; a diffusion model rebuilds the image from nothing else.
"""
# A font that Gradio brings along: the page fetches nothing from elsewhere.
THEME = gr.themes.Soft(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="slate",
    font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "sans-serif"],
)
CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important }
.picture img { width: 100% !important; height: 100% !important; object-fit: contain }
.pixelated img { image-rendering: pixelated }
"""


class Studio:
    """A model on its device, and the three things that the app does with it."""

    def __init__(self, model: str):
        """`model`: folder or Hub id of a VLV."""
        device = _find_device()
        dtype = torch.float32 if device.type == "cpu" else "auto"
        self.name = Path(model).name if Path(model).is_dir() else model
        self.model = AutoModel.from_pretrained(model, trust_remote_code=True, dtype=dtype).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
        self.reading = Lock()  # one image at a time: a large one takes a gigabyte while it is read

    def caption(self, image: str, max_new_tokens: int = 300, num_beams: int = 1) -> Iterator[str]:
        """Write a caption for an image.

        Parameters:
            image: the image file, as it is.
            max_new_tokens: the longest caption, in tokens.
            num_beams: beams of the search; 1 is greedy, and streams the caption as it is written.
        """
        settings = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
        _, caption_embeds = self._see(image)
        if num_beams > 1:  # a beam search settles its first word last: there is nothing to stream
            yield self._write(caption_embeds, **settings)
            return
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_special_tokens=True)
        with ThreadPoolExecutor(1) as pool:
            caption = pool.submit(self._write, caption_embeds, streamer=streamer, **settings)
            caption.add_done_callback(lambda _: streamer.end())  # also when writing has failed: the loop must end
            written = ""
            for piece in filter(None, streamer):  # nothing comes in the middle of a word
                written += piece
                yield written
            yield caption.result()

    def reconstruct(
        self,
        image: str,
        num_inference_steps: int = 8,
        guidance_scale: float = 2.0,
        seed: int = 0,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (how Gradio is asked for one)
    ) -> tuple[Image.Image, Image.Image, str]:
        """Rebuild an image from its caption embeddings alone: the original, its reconstruction, its caption.

        Parameters:
            image: the image file, as it is.
            num_inference_steps: sampling steps; more are slower and finer.
            guidance_scale: how closely the decoder follows the embeddings; 1 switches guidance off.
            seed: another seed starts from other noise.
        """
        original, caption_embeds = self._see(image)
        rebuilt = self._sample(caption_embeds, num_inference_steps, guidance_scale, seed, progress)
        caption = (
            self._write(caption_embeds, max_new_tokens=300, do_sample=False)
            if self.model.caption_head is not None
            else ""
        )
        return original, rebuilt, caption

    def compose(
        self,
        first: str,
        second: str,
        share: float = 0.5,
        num_inference_steps: int = 8,
        guidance_scale: float = 2.0,
        seed: int = 0,
        text: str = "",
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Image.Image:
        """Join the caption embeddings of two images, a share of each, and rebuild them into one picture.

        Parameters:
            first: the image file whose embeddings come first.
            second: the image file whose embeddings follow.
            share: how much of the whole is the first image's, 0 to 1; the rest is the second's.
            num_inference_steps: sampling steps; more are slower and finer.
            guidance_scale: how closely the decoder follows the embeddings; 1 switches guidance off.
            seed: another seed starts from other noise.
            text: words to add, which take the place of the last embeddings.
        """
        (_, first_embeds), (_, second_embeds) = self._see(first), self._see(second)
        length = first_embeds.shape[1]
        kept = round(share * length)
        joined = torch.cat([first_embeds[:, :kept], second_embeds[:, : length - kept]], dim=1)
        return self._sample(joined, num_inference_steps, guidance_scale, seed, progress, text)

    def _see(self, file):
        """What the model sees of an image, small enough for the page, and its caption embeddings."""
        if not file:
            raise gr.Error("Choose an image first.", title="No image", print_exception=False)
        try:
            with self.reading:
                image = self.processor.preprocess_image(file)
                pixel_values = self.processor(images=image)["pixel_values"]
                image.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
        except (OSError, ValueError) as error:
            # The file's name is the user's; the folder in front of it is the server's.
            sentence = str(error).replace(file, Path(file).name)
            raise gr.Error(sentence, title="This image cannot be read", print_exception=False) from error
        with torch.no_grad():
            return image, self.model.encode(pixel_values.to(self.model.device))

    def _write(self, caption_embeds, **settings):
        ids = self.model.generate(caption_embeds=caption_embeds, **settings)
        return self.processor.batch_decode(ids)[0]

    def _sample(self, caption_embeds, num_inference_steps, guidance_scale, seed, progress, text=""):
        if seed is None:
            raise gr.Error("Give a seed: any whole number, 0 for instance.", title="No seed", print_exception=False)

        def show_step(model, step, timestep, tensors):
            progress((step + 1, num_inference_steps), desc="Rebuilding", unit="steps")
            return tensors

        try:
            return self.model.reconstruct(
                caption_embeds=caption_embeds,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=show_step,
                text=text.strip() or None,
                tokenizer=self.processor.decoder_tokenizer,
            )[0]
        except ValueError as error:  # too many words, or a model that reads none
            raise gr.Error(str(error), title="These words cannot be added", print_exception=False) from error


def _find_device():
    if torch.cuda.is_available():  # asked first, because this is what ZeroGPU answers before there is a GPU
        return torch.device("cuda")
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def build_app(studio: Studio) -> gr.Blocks:
    """The page: a tab for each thing that the studio's model has the parts for."""
    config = studio.model.config
    on_gpu = spaces.GPU if spaces else lambda function: function
    look = ["picture", "pixelated"] if studio.processor.decoder_image_size <= 128 else ["picture"]
    with gr.Blocks(title="VLV", delete_cache=(3600, 86400), analytics_enabled=False) as app:
        gr.Markdown(f"{INTRODUCTION}\nThis one is **{studio.name}**.")
        if config.caption_config is not None:
            with gr.Tab("Caption"):
                _caption_tab(on_gpu(studio.caption), look)
        if config.decoder_config is not None:
            with gr.Tab("Reconstruct"):
                _reconstruct_tab(on_gpu(studio.reconstruct), look)
            with gr.Tab("Compose"):
                _compose_tab(on_gpu(studio.compose), look)
    return app.queue(default_concurrency_limit=CONCURRENCY)


def _caption_tab(function, look):
    with gr.Row():
        with gr.Column():
            image = _image_input("Image", look)
            with gr.Accordion("Settings", open=False):
                length = gr.Slider(8, 512, 300, step=1, precision=0, label="Longest caption", info="in tokens")
                beams = gr.Slider(1, 8, 1, step=1, precision=0, label="Beams", info="1 streams the words as they come")
            button = gr.Button("Caption", variant="primary")
        with gr.Column():
            caption = gr.Textbox(label="Caption", lines=6, buttons=["copy"], interactive=False)
    _connect(button, function, [image, length, beams], caption)
    _examples([[example] for example in _example_files()], [image])


def _reconstruct_tab(function, look):
    with gr.Row():
        with gr.Column():
            image = _image_input("Image", look)
            sampling = _sampling_settings()
            button = gr.Button("Reconstruct", variant="primary")
        with gr.Column(scale=2):
            with gr.Row():
                original = _image_output("Original", look)
                rebuilt = _image_output("Reconstruction", look)
            caption = gr.Textbox(label="Caption", lines=3, buttons=["copy"], interactive=False)
    _connect(button, function, [image, *sampling], [original, rebuilt, caption], show_progress_on=rebuilt)
    _examples([[example] for example in _example_files()], [image])


def _compose_tab(function, look):
    with gr.Row():
        with gr.Column(scale=2):
            with gr.Row():
                first, second = _image_input("First image", look), _image_input("Second image", look)
            share = gr.Slider(0, 1, 0.5, step=0.01, label="Share of the first image", info="the rest is the second's")
            words = gr.Textbox(label="Words", info="added to the images, where the model has a text encoder")
            sampling = _sampling_settings()
            button = gr.Button("Compose", variant="primary")
        with gr.Column():
            composed = _image_output("Composition", look)
    _connect(button, function, [first, second, share, *sampling, words], composed)
    files = _example_files()
    _examples([list(pair) for pair in zip(files[::2], files[1::2], strict=False)], [first, second])


def _connect(button, function, inputs, outputs, **settings):
    """A button and an endpoint of the function's name, documented by its docstring."""
    button.click(
        function,
        inputs,
        outputs,
        api_name=function.__name__,
        api_description=inspect.getdoc(function),
        # All requests share the one model, whichever tab they come from.
        concurrency_id="model",
        concurrency_limit=CONCURRENCY,
        **settings,
    )


def _image_input(label, look):
    sources = ["upload", "clipboard", "webcam"]
    image = gr.Image(label=label, type="filepath", sources=sources, height=FRAME, elem_classes=look)
    # The file goes to the processor as it was uploaded. Gradio would open it first: it clips 16-bit images, and fails
    # on what is no image. (A subclass would do, but Gradio writes a .pyi file beside every module that has one.)
    image.preprocess = lambda payload: payload and payload.path
    return image


def _image_output(label, look):
    return gr.Image(
        label=label,
        format="png",
        interactive=False,
        height=FRAME,
        buttons=["download", "fullscreen"],
        elem_classes=look,
    )


def _sampling_settings():
    with gr.Accordion("Settings", open=False):
        return (
            gr.Slider(1, 50, 8, step=1, precision=0, label="Steps", info="more are slower and finer"),
            gr.Slider(1, 10, 2, step=0.1, label="Guidance", info="1 switches it off"),
            gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1),
        )


def _example_files():
    """Of the Space that this file is in, or those that come with the `vlv` package."""
    folder = HERE / "examples"
    if not folder.is_dir() and (package := find_spec("vlv")):
        folder = Path(package.origin).parent / "publish" / "examples"
    suffixes = Image.registered_extensions()
    return sorted(str(file) for file in folder.glob("*") if file.suffix.lower() in suffixes)


def _examples(rows, inputs):
    if rows:
        gr.Examples(rows, inputs, cache_examples=False, api_visibility="private")


def default_model() -> str:
    """The model that the Space's README names, or the checkpoint that comes with the `vlv` package."""
    readme = HERE / "README.md"
    named = (metadata_load(readme) or {}).get("models") if readme.is_file() else None
    if named:
        return named[0]
    try:
        from vlv import tiny_checkpoint
    except ImportError:
        raise ValueError("name a model with --model: the package with the bundled one is not installed.") from None
    return tiny_checkpoint()


@dataclass
class AppArguments:
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a VLV (default: the bundled vlv-tiny, for drawn scenes)."}
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
    try:
        (arguments,) = parser.parse_args_into_dataclasses(argv)
        studio = Studio(arguments.model or default_model())
    except (OSError, ValueError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    build_app(studio).launch(
        share=arguments.share,
        auth=tuple(arguments.auth.split(":", 1)) if arguments.auth else None,
        max_file_size=MAX_FILE_SIZE,
        footer_links=["api", "settings"],
        theme=THEME,
        css=CSS,
    )


if __name__ == "__main__":
    main()
