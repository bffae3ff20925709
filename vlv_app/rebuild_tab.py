"""The tab that rebuilds a picture from its caption embeddings, and draws captions."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from vlv_app.caption_tab import lengths
from vlv_app.markup import comparison, done, figure, figures
from vlv_app.parts import (
    SAMPLING,
    Fields,
    Page,
    caption_box,
    connect,
    copy_button,
    markup_output,
    read_picture,
    result_status,
    run_buttons,
    settings_inputs,
    steps_of,
)
from vlv_app.settings import LARGEST_SEED, check_settings, refusal


def rebuild_tab(page: Page) -> Fields:
    """Build the tab; its settings by their names in the API."""
    studio, files = page.studio, page.files
    button, stop = run_buttons("Reconstruct")
    settings = settings_inputs(*SAMPLING, "num_pictures", **studio.lengths)
    status = result_status("reconstruct")
    compared, pictures = markup_output("comparison"), markup_output("rebuilt")
    text = caption_box("rebuilt-caption", "", lines=3)
    copy_button(text)
    if studio.draws_words:
        gr.Markdown("Edit the caption, and let the decoder draw the words in place of the embeddings.")
        draw = gr.Button("Draw these words", elem_classes=["run"])
        drawing = result_status("drawing")
        drawn = markup_output("drawn")

    def run(
        picture: dict[str, Any] | None, steps: Any, guidance: Any, first_seed: Any, count: Any, length: Any = None
    ) -> Iterator[Any]:
        pixel_values, image, name = read_picture(files, picture, "Image")
        original, shown = files.show(image, name), ""
        made: list[str] = []
        for seed in seeds(first_seed, count):
            part = f"picture {len(made) + 1} of {count}" if int(count) > 1 else ""
            rebuilt = yield from steps_of(studio.reconstruct(pixel_values, steps, guidance, seed, length), part)
            rebuilt = files.show(rebuilt, f"{name}-rebuilt-seed-{seed}")
            made.append(figure(rebuilt, f"Seed {seed}"))
            shown = shown or comparison(original, rebuilt)
            yield [shown, figures(made), ""], done("The picture is rebuilt.") if not studio.writes else None
        if not studio.writes:
            return
        captions = yield from steps_of(studio.caption(pixel_values, num_queries=length))
        yield [shown, figures(made), captions[0].text], done(lengths(captions))

    fields = list(settings.values())
    connect(page, button, stop, run, [page.picture, *fields], [compared, pictures, text], status, [page.picture])

    def run_drawing(picture: dict[str, Any] | None, words: str, *sampling: Any) -> Iterator[Any]:
        if not words or not words.strip():
            raise refusal("Caption: write some words to draw first.")
        name = str((picture or {}).get("name") or "words").rpartition(".")[0] or "words"
        image = yield from steps_of(studio.draw(words, *sampling))
        shown = files.show(image, f"{name}-drawn-seed-{int(sampling[-1])}")
        yield [figures([figure(shown, "Drawn from these words", words)])], done("The words are drawn.")

    if studio.draws_words:
        inputs = [page.picture, text, *fields[: len(SAMPLING)]]
        connect(page, draw, stop, run_drawing, inputs, [drawn], drawing, [page.picture])
    return settings


def seeds(first: Any, count: Any) -> list[int]:
    """So many seeds, from the first one on."""
    checked = check_settings(seed=first, num_pictures=count)
    last = min(checked["seed"] + checked["num_pictures"] - 1, LARGEST_SEED)
    return list(range(checked["seed"], last + 1))
