"""The Collection tab of the app."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from vlv.collection.opening import MOST_IMAGES
from vlv.collection.service import Service
from vlv.collection.store import ORDERS, SCORES, SHOWN
from vlv_app.parts import Fields, Page
from vlv_app.settings import SETTINGS

HERE = Path(__file__).parent
METHODS = (
    *("open_path", "add_files", "about", "remove", "rows", "thumbnail", "edit", "set_keep"),
    *("replace", "add_words", "undo", "caption", "stop", "save"),
)
MEGABYTES = 1000  # of a file that a visitor uploads: a zip may be large


def collection_tab(is_local: bool) -> Callable[[Page], Fields]:
    """
    The function that builds the tab.

    Args:
        is_local: the page is served to this machine only. Then its visitor may name folders of it.
    """

    def build(page: Page) -> Fields:
        service = Service(page.studio, is_local)
        options: dict[str, Any] = {
            "is_local": is_local,
            "megabytes": MEGABYTES,
            "most": MOST_IMAGES,
            "show": list(SHOWN),
            "orders": list(ORDERS),
            "scores": list(SCORES),
            "styles": list(page.studio.styles) if page.studio.takes_prompts else None,
            "settings": {
                name: {"label": SETTINGS[name].label, "value": SETTINGS[name].default}
                for name in ("max_new_tokens", "num_beams")
            },
        }
        script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("collection.js", "collection.css"))
        gr.HTML(
            None,
            html_template='<div class="collection"></div>',
            js_on_load=f"collection({json.dumps(options)}, element, server, upload)",
            head=f"<script>{script}</script><style>{style}</style>",
            server_functions=[_plain(getattr(service, name)) for name in METHODS],
            apply_default_css=False,
            elem_id="collection",
        )
        return {}

    return build


def _plain(method: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function, which Gradio can mark as it wants, of a bound method."""

    def function(request: dict[str, Any]) -> dict[str, Any]:
        return method(request)

    function.__name__ = method.__name__
    return function
