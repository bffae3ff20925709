"""Saving a collection: text files beside the images, a metadata.jsonl, or a zip."""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vlv.captioning.journal import json_line
from vlv.collection.opening import SIDECAR
from vlv.collection.store import Store
from vlv.files import atomic_writer, read_json_lines, writing_to


@dataclass(frozen=True)
class Saved:
    """What came of it."""

    count: int
    left_out: list[str]  # a sentence each

    @property
    def sentence(self) -> str:
        sentence = f"{self.count} caption{'s are' if self.count != 1 else ' is'} saved."
        if self.left_out:
            some = " ".join(self.left_out[:3])
            sentence += f" {len(self.left_out)} left out: {some}"
        return sentence


def save_text_files(store: Store) -> Saved:
    """
    Write each caption into a text file beside its image. A text file that has been changed since it was read is left
    alone.
    """
    saved, left_out = [], []
    owners: dict[Path, str] = {}
    for name, location, text, known in store.kept():
        path = Path(os.path.splitext(location)[0] + SIDECAR)
        owner = owners.setdefault(path, name)
        if owner != name:
            left_out.append(f"{name} and {owner} would share {path.name}: rename one of them.")
            continue
        present = _read(path)
        if present not in (None, "", known, text):
            left_out.append(f"{path.name} was changed by another program: open the collection again to read it.")
            continue
        line = " ".join(text.split())
        if present != line:
            with writing_to(path.parent), atomic_writer(path) as file:
                file.write(f"{line}\n")
        saved.append((name, line))
    store.mark_saved(saved)
    return Saved(len(saved), left_out)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        return "not text"


def save_metadata(store: Store, path: Path) -> Saved:
    """
    Write a metadata.jsonl of ImageFolder: `file_name` and `text`. Rows of other images stay, and so do the other keys
    of all rows; images that are skipped have none.
    """
    captions = {name: text for name, _, text, _ in store.kept()}
    count = len(captions)
    of_here = {row.name for row in store.rows()[0]}
    rows = []
    if path.exists():
        for _, _, row in read_json_lines(path):
            name = row.get("file_name")
            if name in captions:
                rows.append({**row, "text": captions.pop(name)})
            elif name not in of_here:
                rows.append(row)
    rows += [{"file_name": name, "text": text} for name, text in captions.items()]
    with writing_to(path.parent), atomic_writer(path) as file:
        file.writelines(json_line(row).decode() for row in rows)
    return Saved(count, [])


def save_zip(store: Store, path: Path) -> Saved:
    """Write a zip of the images, a text file beside each, and a metadata.jsonl. It appears whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    rows, left_out, used = [], [], set()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with writing_to(path.parent), zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            for name, location, text, _ in store.kept():
                if not os.path.isfile(location):
                    left_out.append(f"{name}: the image is not there any more.")
                    continue
                archive.write(location, name)
                sidecar = str(PurePosixPath(name).with_suffix(SIDECAR))
                if sidecar not in used:
                    archive.writestr(sidecar, f"{' '.join(text.split())}\n")
                    used.add(sidecar)
                rows.append({"file_name": name, "text": text})
            archive.writestr("metadata.jsonl", b"".join(map(json_line, rows)))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return Saved(len(rows), left_out)
