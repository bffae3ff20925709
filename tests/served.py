"""A running server, and the requests that tests send to it."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from vlv.cli import main

COMPLETIONS = "/v1/chat/completions"


class Server(NamedTuple):
    process: subprocess.Popen
    address: str
    said: list[str]  # the lines of its log


@contextmanager
def running_server(*arguments: str) -> Iterator[Server]:
    """A process of `vlv serve` on a free port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vlv", "serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"answers at (http://\S+)/v1", line):
                threading.Thread(target=lambda: said.extend(process.stderr), daemon=True).start()
                yield Server(process, found[1], said)
                return
        raise AssertionError(f"vlv serve ended with {process.wait()}: {''.join(said)}")
    finally:
        process.kill()
        process.wait()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def asking(url: str, begun: str | None = None, **settings) -> dict:
    """The body of a request for the caption of an image."""
    parts = [{"type": "text", "text": "Describe this."}, {"type": "image_url", "image_url": {"url": url}}]
    messages = [{"role": "user", "content": parts}]
    if begun is not None:
        messages.append({"role": "assistant", "content": begun})
    return {"messages": messages, **settings}


def contents(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [choice["message"]["content"] for choice in response.json()["choices"]]


def complaint(response: httpx.Response) -> str:
    """The one sentence of an error."""
    error = response.json()["error"]
    assert error["code"] == response.status_code and "Traceback" not in response.text
    (sentence,) = error["message"].splitlines()
    return sentence


def captions_of(folder: Path, output: Path, *options: str) -> dict[str, str]:
    """By file, what `vlv caption` writes."""
    assert main(["caption", str(folder), "--output", str(output), "--num_workers", "0", *options]) == 0
    rows = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    return {row["file_name"]: row["text"] for row in rows}
