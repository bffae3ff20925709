"""The parts of the page that its tabs have in common."""

import base64
import io
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from vlv_app.markup import progress
from vlv_app.pictures import MEGABYTES, PictureFiles, formats
from vlv_app.settings import SETTINGS, Setting
from vlv_app.studio import Step, Studio
from vlv_app.work import each_as

CONCURRENCY = 2  # one request's file is read and its answer sent while another one's is computed
EXAMPLE_PIXELS = 96
SAMPLING = ("num_inference_steps", "guidance_scale", "seed")

Wrapper = Callable[[Callable], Callable]
Fields = Mapping[
    str, gr.Slider | gr.Number | gr.Textbox | gr.Dropdown | gr.Checkbox | gr.Radio
]  # by the names that the API has for them


@dataclass(frozen=True)
class Page:
    """What every tab is built with."""

    studio: Studio
    picture: gr.HTML  # the picture that all tabs share
    on_gpu: Wrapper  # asks for a GPU on ZeroGPU
    examples: Sequence[str]

    @property
    def files(self) -> PictureFiles:
        return self.studio.files


def picture_input(files: PictureFiles, examples: Sequence[str], field: str, key: str) -> gr.HTML:
    """
    An input for a picture: a file, a drop, the clipboard, the camera or an example.

    Its value is `None` or a dictionary: `id` of the file, and its `name`. It shows the picture as the model sees it.
    (Gradio's own input shows the file as the browser does: transparency over grey, a TIFF or HEIC not at all.)

    Args:
        field: what it is called.
        key: under which the browser keeps the picture when the page is loaded again.
    """

    def look(id: str) -> dict[str, Any]:
        """What the page shows of an upload, or the sentence that says what is wrong with it."""
        try:
            path = files.path_of(id, field)
            shown = files.show(files.read(path, field)[1], "shown")
        except gr.Error as error:
            return {"error": error.message}
        return {"id": files.id_of(path), "url": shown.url, "width": shown.width, "height": shown.height}

    def example(number: int) -> dict[str, Any]:
        file = examples[int(number)]
        return {"name": Path(file).name, **look(files.keep(file))}

    options = {
        "field": field,
        "key": key,
        "megabytes": MEGABYTES,
        "hint": f"Drop a picture here, paste it, or choose a file: {formats()}, up to {MEGABYTES} MB.",
        "examples": [_thumbnail(file) for file in examples],
    }
    return gr.HTML(
        None,
        html_template='<div class="picture-input"></div>',
        js_on_load=f"vlv.picture({json.dumps(options)}, element, props, trigger, server, upload); // 'input'",
        server_functions=[look, example],
        apply_default_css=False,
        elem_id=f"picture-{key}",
    )


def _thumbnail(file: str) -> str:
    """An example as a `data:` URL. The page shows it without asking the server."""
    with Image.open(file) as image:
        image = image.convert("RGB")
        image.thumbnail((EXAMPLE_PIXELS, EXAMPLE_PIXELS))
        content = io.BytesIO()
        image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def read_picture(files: PictureFiles, picture: dict[str, Any] | None, field: str) -> tuple[Any, Image.Image, str]:
    """The value of a picture input -> `pixel_values`, a picture for the page, and its name without suffix."""
    path = files.path_of(picture and picture.get("id"), field)
    pixel_values, image = files.read(path, field)
    return pixel_values, image, Path(str(picture.get("name") or path)).stem


def settings_inputs(*names: str, **more: Setting) -> dict[str, gr.Slider | gr.Number]:
    """The inputs of settings, folded away, by the names that the API has for them. `more`: those of this model."""
    settings = {name: SETTINGS[name] for name in names} | more
    with gr.Accordion("Settings", open=False):
        return {name: setting.component() for name, setting in settings.items()}


def prompt_inputs(studio: Studio) -> dict[str, gr.Dropdown | gr.Textbox]:
    """A menu of the model's own prompts and a field for another, by their names in the API; none without prompts."""
    if not studio.takes_prompts:
        return {}
    with gr.Row():
        styles = [("the model's own", ""), *((name, name) for name in studio.styles)]
        style = gr.Dropdown(styles, value="", label="Style", info="A prompt that the model was taught.", scale=1)
        prompt = gr.Textbox(label="Prompt", info="A wish or a question in your words, in place of a style.", scale=2)
    return {"style": style, "prompt": prompt}


def wording_inputs() -> dict[str, gr.Textbox | gr.Checkbox]:
    """What is asked of the words of a caption, folded away, by the names that the API has for it."""
    with gr.Accordion("Words", open=False):
        return {
            "words": gr.Textbox(label="Number of words", info="Such as 20-40; empty for any."),
            "trigger_words": gr.Textbox(label="Trigger words", info="They come first, with commas between them."),
            "caption_prefix": gr.Textbox(label="Before the caption", info="The model does not read it."),
            "caption_suffix": gr.Textbox(label="After the caption"),
            "clean_tags": gr.Checkbox(label="Tags", info="Keep each of the comma-separated tags once."),
        }


def result_status(tab: str) -> gr.HTML:
    """Where a tab says how far it is and what came of it."""
    return gr.HTML("", elem_classes=["status"], elem_id=f"status-{tab}", apply_default_css=False)


def markup_output(name: str) -> gr.HTML:
    """Where pictures and other results stand."""
    return gr.HTML("", elem_id=name, elem_classes=["result"], apply_default_css=False)


def caption_box(name: str, info: str, lines: int) -> gr.Textbox:
    """A box of words. (With Gradio's own copy button in it, the label would name that button in place of the box.)"""
    return gr.Textbox(label="Caption", info=info or None, lines=lines, buttons=[], elem_id=name)


def copy_button(box: gr.Textbox) -> None:
    """A button that copies what is in a box."""
    button = gr.Button("Copy", size="sm")
    button.click(None, [box], None, js=f"text => vlv.copy(text, {json.dumps(box.elem_id)})")


def run_buttons(*labels: str) -> list[gr.Button]:
    """The buttons that run something, the first of them as the tab's main one, and Stop."""
    with gr.Row():
        return [
            *(
                gr.Button(label, variant="secondary" if place else "primary", elem_classes=["run"], scale=3)
                for place, label in enumerate(labels)
            ),
            gr.Button("Stop", elem_classes=["stop"], scale=1, min_width=80),
        ]


def connect(
    page: Page,
    button: gr.Button,
    stop: gr.Button,
    run: Callable[..., Iterator[Any]],
    inputs: Sequence[gr.components.Component],
    outputs: Sequence[gr.components.Component],
    status: gr.HTML,
    pictures: Sequence[gr.HTML],
) -> None:
    """
    Make a button run a generator.

    Args:
        run: yields the values of `outputs` and a status (a [`Step`] or HTML). `None` leaves what is there.
        outputs: what it fills, without the status. They are cleared when one of `pictures` changes or the run fails,
            because a result must never stand beside another picture than its own.
        stop: the button that ends the run.
    """

    def runs(*values: Any) -> Iterator[Any]:
        yield *blank, progress(Step("Looking at the picture"))
        for filled, step in run(*values):
            filled = [gr.skip()] * len(outputs) if filled is None else filled
            step = gr.skip() if step is None else progress(step) if isinstance(step, Step) else step
            yield *filled, step

    blank = [""] * len(outputs)
    cleared, key = json.dumps([*blank, ""]), json.dumps(status.elem_id)
    button.click(None, None, [status], js=f"() => vlv.started({key})")
    event = button.click(
        page.on_gpu(said(runs)),
        list(inputs),
        [*outputs, status],
        api_visibility="private",
        show_progress="hidden",
        # All requests share the one model, whichever tab they come from.
        concurrency_id="model",
        concurrency_limit=CONCURRENCY,
    )
    everything = [*outputs, status]
    # A stopped run counts as failed, too: what it has made stays.
    event.failure(None, everything, everything, js=f"(...values) => vlv.failed({key}, values, {cleared})")
    stop.click(None, [status], [status], js=f"status => vlv.stopped({key}, status)", cancels=[event])
    for picture in pictures:
        picture.input(None, None, everything, js=f"() => {cleared}", cancels=[event])


def steps_of(computation: Generator[Step, None, Any], part: str = "") -> Generator[tuple[None, Step], None, Any]:
    """
    Passes on the steps of a computation of the studio in the form that [`connect`] takes. Its result is the
    computation's.

    Args:
        part: of what this is one part, such as "picture 2 of 4".
    """
    return (yield from each_as(computation, lambda step: (None, step.within(part) if part else step)))


def said(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A generator whose unexpected errors reach the visitor as a sentence. The log has the rest."""

    @wraps(function)
    def speaking(*values: Any) -> Iterator[Any]:
        try:
            yield from function(*values)
        except gr.Error:
            raise
        except Exception as error:
            raise gr.Error(
                f"The server could not finish this ({type(error).__name__}): its log says why. Try it again.",
                duration=None,
            ) from error

    return speaking
