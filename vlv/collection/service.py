"""What the Collection tab asks the server for. Each method takes and returns what JSON can hold."""

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from threading import Semaphore
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from processing_vlv import load_image
from vlv.captioning.settings import Decoding
from vlv.collection.opening import add_path, add_uploads
from vlv.collection.runs import Runs
from vlv.collection.saving import Saved, save_metadata, save_text_files, save_zip
from vlv.collection.store import ORDERS, SCORES, SHOWN, Row, Store
from vlv.collection.words import adding, replacing
from vlv_app.pictures import PictureFiles
from vlv_app.settings import check_settings
from vlv_app.studio import Studio
from wording_vlv import Wishes

PAGE = 20  # images
THUMBNAIL = 256  # pixels of the longer side
ID = re.compile(r"[0-9a-f]{32}")


def home() -> Path:
    """The folder of all collections of this user: beside other programs' data, so that no clean-up takes it."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "vlv" / "collections"


def answering(method: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Errors about what the visitor gave become an answer with a sentence."""

    @wraps(method)
    def answer(self: "Service", request: dict[str, Any]) -> dict[str, Any]:
        try:
            return method(self, **request)
        except gr.Error as error:
            return {"error": error.message}
        except (OSError, ValueError) as error:
            return {"error": " ".join(str(error).split())}

    return answer


class Service:
    """
    Args:
        is_local: the page is served to this machine only, so that its visitor may name folders of it.
    """

    def __init__(self, studio: Studio, is_local: bool):
        self.files, self.is_local = studio.files, is_local
        self.runs = Runs(studio.model, studio.processor)
        self._thumbnails = Semaphore(2)  # a page of thumbnails leaves the others a thread

    # ---- opening -------------------------------------------------------------------------------------------

    @answering
    def open_path(self, path: str) -> dict[str, Any]:
        """The collection of a folder or captions file; the same one each time."""
        if not self.is_local:
            raise ValueError("This page is served to other machines too: upload the files in place of a path.")
        if not path.strip():
            raise ValueError("Name a folder, or a captions file (.jsonl), first.")
        place = os.path.realpath(os.path.expanduser(path.strip()))
        id = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        store = self._store(id, make=True)
        count = add_path(store, place)
        store.set_fact("path", place)
        return {"id": id, "sentence": f"{count} image{'s' if count != 1 else ''} added.", **self._about(id, store)}

    @answering
    def add_files(self, files: list[list[str]], id: str | None = None) -> dict[str, Any]:
        """Add uploads, given as path and name, to a collection, which is made if need be."""
        uploads = []
        for path, name in files:
            uploads.append((PictureFiles.path_of(path, name), name))
        store = self._store(id or (id := secrets.token_hex(16)), make=True)
        if store.fact("path"):
            raise ValueError("This collection is a folder of this computer: close it first, or add files there.")
        count = add_uploads(store, uploads, self._folder(id) / "images")
        return {"id": id, "sentence": f"{count} image{'s' if count != 1 else ''} added.", **self._about(id, store)}

    @answering
    def about(self, id: str) -> dict[str, Any]:
        """How a collection is, and how far its run."""
        return {"id": id, **self._about(id, self._store(id))}

    @answering
    def remove(self, id: str) -> dict[str, Any]:
        """Delete a collection and its uploaded images. A folder of this computer keeps all its files."""
        run = self.runs.find(id)
        if run is not None:
            run.stopping.set()
        self._store(id)
        shutil.rmtree(self._folder(id))
        return {"sentence": "The collection is deleted."}

    # ---- rows ----------------------------------------------------------------------------------------------

    @answering
    def rows(
        self, id: str, search: str = "", show: str = "all", order: str = "as added", page: int = 0
    ) -> dict[str, Any]:
        """One page of images."""
        if show not in SHOWN or order not in ORDERS:
            raise ValueError(f"Show must be one of {', '.join(SHOWN)}; the order one of {', '.join(ORDERS)}.")
        store = self._store(id)
        _, total = store.rows(search, show, order, count=0)
        pages = max(1, -(-total // PAGE))
        page = min(max(int(page), 0), pages - 1)
        rows, _ = store.rows(search, show, order, page * PAGE, PAGE)
        return {"rows": list(map(_json, rows)), "total": total, "page": page, "pages": pages, "size": PAGE}

    @answering
    def thumbnail(self, id: str, number: int) -> dict[str, Any]:
        """The address of a small picture of an image."""
        row = self._store(id).row(int(number))
        changed = os.stat(row.location).st_mtime_ns
        name = hashlib.sha256(f"{row.location}/{changed}".encode("utf-8", "surrogateescape")).hexdigest()
        path = Path(get_upload_folder()) / "thumbnails" / f"{name}.jpg"
        if not path.exists():
            with self._thumbnails:
                image = load_image(row.location)
                image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR, reducing_gap=2)
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{secrets.token_hex(4)}")
            image.save(unfinished, "JPEG", quality=85)
            unfinished.replace(path)
            self.files.made.add(str(path))
        return {"url": f"gradio_api/file={path}", "width": THUMBNAIL}

    @answering
    def edit(self, id: str, number: int, text: str, version: int) -> dict[str, Any]:
        """Change a caption; where another window was first, the row as it is there."""
        store = self._store(id)
        row = store.edit(int(number), text, int(version))
        return {"row": _json(row)} if row else {"conflict": _json(store.row(int(number)))}

    @answering
    def set_keep(self, id: str, number: int, keep: bool) -> dict[str, Any]:
        """Keep or skip an image."""
        self._store(id).set_keep(int(number), bool(keep))
        return {}

    # ---- many captions at once -----------------------------------------------------------------------------

    @answering
    def replace(self, id: str, find: str, by: str, search: str = "", show: str = "all") -> dict[str, Any]:
        """Find and replace in all captions that are found."""
        return _changed(self._store(id).change_all(replacing(find, by), search, show))

    @answering
    def add_words(
        self, id: str, before: str = "", behind: str = "", triggers: str = "", search: str = "", show: str = "all"
    ) -> dict[str, Any]:
        """Put words around all captions that are found."""
        return _changed(self._store(id).change_all(adding(before, behind, triggers), search, show))

    @answering
    def undo(self, id: str) -> dict[str, Any]:
        """Take back the last change of many captions."""
        return _changed(self._store(id).undo(), "taken back")

    @answering
    def caption(self, id: str, max_new_tokens: Any, num_beams: Any, prefix: str = "", **wishes: Any) -> dict[str, Any]:
        """Caption what has no caption yet. `wishes` are those of `Decoding`, empty for none."""
        checked = check_settings(max_new_tokens=max_new_tokens, num_beams=num_beams)
        store = self._store(id)
        decoding = Decoding(**checked, prefix=prefix or None, **{name: it for name, it in wishes.items() if it})
        Wishes(self.runs.processor, **decoding.wishes)  # an error is said now, not by the run
        self.runs.start(id, store, decoding)
        return self._about(id, store)

    @answering
    def stop(self, id: str) -> dict[str, Any]:
        """End the run; what it has captioned stays."""
        run = self.runs.find(id)
        if run is not None:
            run.stopping.set()
        return self._about(id, self._store(id))

    # ---- saving --------------------------------------------------------------------------------------------

    @answering
    def save(self, id: str, kind: str) -> dict[str, Any]:
        """Save as `txt` files beside the images, as `metadata.jsonl`, or as a `zip` to download."""
        store = self._store(id)
        path = Path(store.fact("path") or self._folder(id) / "images")
        if not store.kept():
            raise ValueError("There is nothing to save: no image that is kept has a caption.")
        if kind == "txt":
            if store.fact("path") is None:
                raise ValueError("Uploaded images have no folder of yours to write to: download a zip.")
            return _saved(save_text_files(store))
        target = path if path.suffix == ".jsonl" else path / "metadata.jsonl"
        if kind == "metadata.jsonl" and store.fact("path") is not None:
            saved = save_metadata(store, target)
            return {"sentence": f"{saved.sentence} They are in {target}."}
        download = Path(get_upload_folder()) / secrets.token_hex(20) / ("captions.zip" if kind == "zip" else kind)
        saved = save_zip(store, download) if kind == "zip" else save_metadata(store, download)
        self.files.made.add(str(download))
        return {**_saved(saved), "url": f"gradio_api/file={download}", "name": download.name}

    # ---- within --------------------------------------------------------------------------------------------

    def _folder(self, id: str) -> Path:
        if not isinstance(id, str) or not ID.fullmatch(id):
            raise ValueError("This is not the id of a collection: open it again.")
        return home() / id

    def _store(self, id: str, make: bool = False) -> Store:
        database = self._folder(id) / "collection.sqlite"
        if make:
            database.parent.mkdir(parents=True, exist_ok=True)
        elif not database.is_file():
            raise ValueError("The collection is not there any more: open it again.")
        return Store(database)

    def _about(self, id: str, store: Store) -> dict[str, Any]:
        run = self.runs.find(id)
        return {
            "counts": store.counts(),
            "path": store.fact("path"),
            "run": run and {"sentence": run.sentence, "done": run.done, "total": run.total, "ended": bool(run.ended)},
        }


def _json(row: Row) -> dict[str, Any]:
    columns = ("number", "name", "text", "error", "keep", "version", *SCORES)
    return {name: getattr(row, name) for name in columns}


def _changed(count: int, what: str = "changed") -> dict[str, Any]:
    return {"sentence": f"{count} caption{'s are' if count != 1 else ' is'} {what}."}


def _saved(saved: Saved) -> dict[str, Any]:
    return {"sentence": saved.sentence}
