"""The app as a process of its own, and what the tests of it have in common."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import gradio_client
import numpy as np
from paths import ROOT
from PIL import Image

EXAMPLE = sorted(ROOT.glob("vlv/publish/examples/*.png"))[0]
NEW_TOKENS = 24  # of the captions here: long enough to differ, short enough to be quick


class App:
    """`python spaces_app.py` as a process of its own, on a free port."""

    def __init__(self, log, *arguments, script=ROOT / "spaces_app.py", **environment):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://{environment.get('GRADIO_SERVER_NAME', '127.0.0.1')}:{port}"
        self.log = Path(log)
        environment = {
            **os.environ,
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_TEMP_DIR": str(self.log.parent / "uploads"),
            **environment,
        }
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(script), *map(str, arguments)],
                stdout=output,
                stderr=output,
                env=environment,
            )

    def __enter__(self):
        for _ in range(6000):  # importing everything takes minutes on a busy machine
            if "Running on local URL" in self.log.read_text():
                return self
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise AssertionError(f"The app did not start:\n{self.log.read_text()}")

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait()

    def client(self, **kwargs):
        return gradio_client.Client(self.url, verbose=False, **kwargs)


def upload(file):
    return gradio_client.handle_file(str(file))


def caption_of(captioner, image, **settings):
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **settings}
    return captioner(image, **settings)[0]["generated_text"]


def pixels(image):
    return np.asarray(Image.open(image) if isinstance(image, (str, Path)) else image)
