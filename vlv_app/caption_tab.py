"""The tab that captions one picture."""

import json
from collections.abc import Generator, Iterator
from typing import Any

import gradio as gr

from vlv_app.markup import captions as caption_list
from vlv_app.markup import done
from vlv_app.parts import (
    Fields,
    Page,
    caption_box,
    connect,
    copy_button,
    markup_output,
    prompt_inputs,
    read_picture,
    result_status,
    run_buttons,
    settings_inputs,
    wording_inputs,
)
from vlv_app.studio import Caption, Step
from vlv_app.work import each_as

NUMBERS = ("max_new_tokens", "num_beams", "temperature", "num_captions", "seed")


def caption_tab(page: Page) -> Fields:
    """Build the tab; its settings by their names in the API."""
    with gr.Row():
        prefix = gr.Textbox(label="Beginning", info="The caption continues it. It may be empty.", scale=2)
        button, stop = run_buttons("Caption")
    inputs = {
        "prefix": prefix,
        **prompt_inputs(page.studio),
        **settings_inputs(*NUMBERS, **page.studio.lengths),
        **wording_inputs(),
    }
    status = result_status("caption")
    text = caption_box("caption-text", "You can edit it.", lines=5)
    others = markup_output("captions")
    with gr.Row():
        copy_button(text)
        save = gr.Button("Download as text", size="sm")
        link = gr.Button("Link to this result", size="sm")
    address = markup_output("link")

    def run(picture: dict[str, Any] | None, *values: Any) -> Iterator[Any]:
        pixel_values, _, _ = read_picture(page.files, picture, "Image")
        asked = dict(zip(inputs, values, strict=True))
        written = yield from streamed(page.studio.caption(pixel_values, **asked))
        texts = [caption.text for caption in written]
        yield [texts[0], caption_list(texts), ""], done(lengths(written))

    names, fields = list(inputs), list(inputs.values())
    connect(page, button, stop, run, [page.picture, *fields], [text, others, address], status, [page.picture])
    save.click(None, [page.picture, text], None, js="(picture, text) => vlv.saveText(picture, text)")
    link.click(
        None,
        [page.picture, *fields],
        [address],
        js=f"(picture, ...values) => vlv.link('Caption', picture, {json.dumps(names)}, values)",
    )
    return inputs | {"caption": text}


def streamed(computation: Generator[Step, None, Any]) -> Generator[Any, None, Any]:
    """As `steps_of`, with the caption so far in the first output."""
    return (yield from each_as(computation, lambda step: ([step.text, "", ""] if step.text else None, step)))


def lengths(captions: list[Caption]) -> str:
    """How long captions became, and whether that was the length allowed."""
    tokens = ", ".join(str(caption.tokens) for caption in captions)
    sentence = f"Done: {tokens} token{'s' if tokens != '1' else ''}."
    cut = sum(caption.is_cut for caption in captions)
    if not cut:
        return sentence
    which = "The caption was" if len(captions) == 1 else f"{cut} of {len(captions)} captions were"
    return f"{sentence} {which} cut at the longest length: raise Longest caption in the settings."
