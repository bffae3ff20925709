"""`vlv serve`: an OpenAI-compatible endpoint that captions images."""

import os
import signal
import socket
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vlv import find_bundled
from vlv.arguments import CommandParser
from vlv.captioning.settings import Decoding, ModelOptions, option

NEEDED = ("httpx", "pydantic", "safehttpx", "starlette", "uvicorn")


@dataclass(frozen=True)
class ServeArguments:
    host: str = option("127.0.0.1", "Address to listen on. Others than 127.0.0.1 let other machines in.")
    port: int = option(8000, "Port to listen on.")
    batch_size: str = option(
        "auto", "Waiting images that are captioned at once; auto takes as many as fit into memory.", metavar="N"
    )
    max_image_mb: float = option(20, "Largest image that a client may send, in megabytes of its file.")
    max_requests: int = option(256, "Requests that may be open at once; more are answered with status 503.")
    timeout: float = option(120, "Seconds that a request may take, its wait included.")

    def __post_init__(self):
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise ValueError(f"--batch_size is {self.batch_size}; it must be at least 1, or auto.")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port is {self.port}; it must be between 0 and 65535 (0: one that is free).")
        for name in ("max_image_mb", "max_requests", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be above 0.")


def main(argv: list[str]) -> None:
    parser = CommandParser(
        ServeArguments,
        Decoding,
        ModelOptions,
        prog="vlv serve",
        description="Answer OpenAI's chat completions: a message with an image gets its caption. The settings of the "
        "captions hold for requests that ask for no others, and no caption gets longer than --max_new_tokens.",
        epilog="example: vlv serve --model my-vlv --port 8000; then POST to http://127.0.0.1:8000/v1/chat/completions",
    )
    arguments, decoding, model = parser.parse(argv)
    if decoding.best_of is not None:
        raise ValueError("vlv serve does not follow --best_of: leave it out.")
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"The endpoint needs {', '.join(missing)}, not installed here: pip install 'vlv[serve]'.")
    with _listen(arguments.host, arguments.port) as listener:
        _serve(listener, arguments, decoding, model)


def _listen(host: str, port: int) -> socket.socket:
    """The socket, before the model is loaded: a port that is taken is told at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host} is no address of this machine ({error}).") from error
    try:
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno).lower()
        raise ValueError(f"--port {port} of {host} cannot be used ({reason}): choose another.") from error


def _serve(listener: socket.socket, arguments: ServeArguments, decoding: Decoding, model: ModelOptions) -> None:
    # Imported only now: torch would keep --help and wrong arguments waiting.
    import uvicorn

    from vlv.captioning.engine import make_captioner
    from vlv.serving.app import Limits, make_app
    from vlv.serving.pictures import MEGABYTE
    from vlv.serving.service import Service

    batch_size = None if arguments.batch_size == "auto" else int(arguments.batch_size)
    limits = Limits(int(arguments.max_image_mb * MEGABYTE), arguments.timeout, arguments.max_requests)
    captioner = make_captioner(model, decoding, batch_size)
    source = find_bundled(model.model)
    name = Path(source).resolve().name if os.path.isdir(source) else source
    service = Service(captioner, name, limits.image_bytes, batch_size)
    app = make_app(service, limits)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(limits.seconds) + 1,
    )
    # On SIGTERM, uvicorn answers the open requests, and then passes the signal on. Nothing is left to do by then.
    signal.signal(signal.SIGTERM, lambda *_: None)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    print(f"vlv serve: {name} answers at {address}; Ctrl-C stops it.", file=sys.stderr, flush=True)
    uvicorn.Server(config).run(sockets=[listener])
