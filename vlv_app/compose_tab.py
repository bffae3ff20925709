"""The tab that composes two pictures into one."""

from collections.abc import Generator, Iterator
from typing import Any

import gradio as gr

from vlv_app.markup import done, figure, figures
from vlv_app.parts import (
    SAMPLING,
    Fields,
    Page,
    connect,
    markup_output,
    picture_input,
    read_picture,
    result_status,
    run_buttons,
    settings_inputs,
    steps_of,
)
from vlv_app.settings import SETTINGS, check_settings
from vlv_app.studio import COMPOSITIONS


def compose_tab(page: Page) -> Fields:
    """Build the tab; its settings by their names in the API."""
    studio, files = page.studio, page.files
    with gr.Row():
        with gr.Column():
            second = picture_input(files, page.examples, "Second image", "second")
        with gr.Column(scale=2):
            share = SETTINGS["share"].component()
            method = gr.Radio(
                list(COMPOSITIONS),
                value="join",
                label="Method",
                info="Join takes the leading embeddings of each image, interpolate a weighted mean of them.",
            )
            words = gr.Textbox(
                "",  # a field that is never shown would hand on None
                label="Words",
                info="What else the picture should show. They may be left out.",
                visible=studio.draws_words,
            )
            button, row, stop = run_buttons("Compose", "Compose several shares")
            settings = settings_inputs(*SAMPLING, "num_shares")
    status = result_status("compose")
    composed = markup_output("composed")

    def composition(
        first: Any, other: Any, share: float, method: str, words: str, sampling: Any, part: str = ""
    ) -> Generator[Any, None, str]:
        steps, guidance, seed = sampling
        computation = studio.compose(
            first[0], other[0], share, steps, guidance, seed, words, method, with_caption=bool(part)
        )
        image, caption = yield from steps_of(computation, part)
        shown = files.show(image, f"{first[2]}-{other[2]}-{share:.2f}")
        return figure(shown, f"{share:.0%} of the first image", caption)

    def read(picture: Any, other: Any) -> tuple[Any, Any]:
        return read_picture(files, picture, "Image"), read_picture(files, other, "Second image")

    def run(picture: Any, other: Any, share: Any, method: str, words: str, *numbers: Any) -> Iterator[Any]:
        first, second = read(picture, other)
        (share,) = check_settings(share=share).values()
        result = yield from composition(first, second, share, method, words, numbers[:-1])
        yield [figures([result])], done("The picture is composed.")

    def run_row(picture: Any, other: Any, share: Any, method: str, words: str, *numbers: Any) -> Iterator[Any]:
        *sampling, count = numbers
        first, second = read(picture, other)
        (count,) = check_settings(num_shares=count).values()
        results: list[str] = []
        for number in range(count):
            part = f"picture {number + 1} of {count}"
            each = 1 - number / (count - 1)
            results.append((yield from composition(first, second, each, method, words, sampling, part)))
            yield [figures(results)], None
        yield [figures(results)], done(f"{count} pictures are composed.")

    fields = [share, method, words, *settings.values()]
    inputs = [page.picture, second, *fields]
    for each, function in ((button, run), (row, run_row)):
        connect(page, each, stop, function, inputs, [composed], status, [page.picture, second])
    return {"share": share, "method": method, "text": words, **settings}
