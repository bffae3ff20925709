"""The page: a tab for each thing that the model has the parts for."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from vlv_app.caption_tab import caption_tab
from vlv_app.compose_tab import compose_tab
from vlv_app.endpoints import add_endpoints
from vlv_app.parts import CONCURRENCY, Fields, Page, Wrapper, picture_input
from vlv_app.pictures import MEGABYTES
from vlv_app.rebuild_tab import rebuild_tab
from vlv_app.studio import Studio

HERE = Path(__file__).parent
INTRODUCTION = """
# Vision · Language · Vision
A VLV reads an image into a few *caption embeddings*, vectors where a text-to-image model expects words.
A language model writes them down as a caption; a diffusion model rebuilds the image from nothing else.
"""
MANY = "Many images at once: where the `vlv` package is installed, `vlv app` also has a tab for collections."
THEME = gr.themes.Soft(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="slate",
    # A font that Gradio brings along: the page fetches nothing from elsewhere.
    font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "sans-serif"],
).set(  # text has a contrast of 4.5 to what is behind it, in both themes
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    checkbox_label_background_fill_selected="*primary_700",
    checkbox_label_background_fill_selected_dark="*primary_700",
    button_secondary_background_fill_dark="*neutral_700",
    button_secondary_background_fill_hover_dark="*neutral_600",
    block_title_background_fill="transparent",
    block_title_background_fill_dark="transparent",
    block_title_text_color="*neutral_800",
    block_title_text_color_dark="*neutral_100",
    block_title_padding="0",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    input_border_color="*neutral_500",
    input_border_color_dark="*neutral_400",
    input_border_width="1px",
    color_accent="*primary_700",
    slider_color="*primary_700",
)


class Tab(NamedTuple):
    """A tab of the page."""

    name: str
    build: Callable[[Page], Fields]  # returns what the browser keeps
    megabytes: int = MEGABYTES  # of the largest file that can be uploaded there


def build_app(
    studio: Studio, examples: Sequence[str] = (), on_gpu: Wrapper = lambda function: function, more: Sequence[Tab] = ()
) -> gr.Blocks:
    """
    Args:
        examples: files of example pictures.
        on_gpu: what a function is wrapped in that needs a GPU, on ZeroGPU.
        more: other tabs.
    """
    tabs: list[Tab] = []
    if studio.writes:
        tabs.append(Tab("Caption", caption_tab))
    if studio.rebuilds:
        tabs += [Tab("Reconstruct", rebuild_tab), Tab("Compose", compose_tab)]
    with gr.Blocks(title="VLV", delete_cache=(3600, 86400), analytics_enabled=False) as app:
        gr.Markdown(f"{INTRODUCTION}\n{MANY if not more else ''}")
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="shared", min_width=280):
                picture = picture_input(studio.files, examples, "Image", "image")
                gr.Markdown(
                    f"The model is **{studio.name}**. {studio.purpose or 'Its card does not say what it is for.'}"
                )
            page = Page(studio, picture, on_gpu, examples)
            with gr.Column(scale=3, elem_id="work"), gr.Tabs(overflow_behavior="wrap"):
                for each in (*tabs, *more):
                    with gr.Tab(each.name) as tab:
                        kept = each.build(page)
                    tab.select(None, None, None, js=f"() => vlv.tabSelected({json.dumps(each.name)})")
                    _keep(app, each.name, studio.name, kept)
        app.load(None, None, None, js="() => vlv.loaded()")
        add_endpoints(studio, on_gpu)
    app.temp_file_sets.append(studio.files.made)
    return app.queue(default_concurrency_limit=CONCURRENCY)


def _keep(app: gr.Blocks, tab: str, model: str, fields: Fields) -> None:
    """Keep what is in the fields of a tab when the page is loaded again in the same window of the browser."""
    if not fields:
        return
    names, components = json.dumps(list(fields)), list(fields.values())
    arguments = f"{json.dumps(tab)}, {json.dumps(model)}, {names}, values"
    restored = app.load(None, components, components, js=f"(...values) => vlv.restore({arguments})")
    restored.then(None, None, None, js=f"() => vlv.restored({json.dumps(tab)})")
    changes = [component.change for component in components]
    gr.on(changes, None, components, None, js=f"(...values) => vlv.keep({arguments})")


def launch_settings(more: Sequence[Tab] = ()) -> dict[str, Any]:
    """What `Blocks.launch` needs for the page with these tabs."""
    return {
        "max_file_size": f"{max([MEGABYTES, *(tab.megabytes for tab in more)])}mb",
        "footer_links": ["api", "settings"],
        "theme": THEME,
        "css_paths": HERE / "page.css",
        "head": f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        "ssr_mode": False,
    }
