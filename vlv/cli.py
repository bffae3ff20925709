"""The `vlv` command: finds the requested command, runs it, and turns its errors into one line."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper
from typing import NamedTuple


class Command(NamedTuple):
    module: str  # imported only when the command runs; its `main(argv)` returns an exit status or None for success
    summary: str
    in_parts: bool = False  # whether several processes of a launcher can share its work


COMMANDS = {
    "caption": Command("vlv.commands.caption", "write a caption for each image", in_parts=True),
    "reconstruct": Command("vlv.commands.reconstruct", "rebuild images from their caption embeddings"),
    "train": Command("vlv.commands.train", "train or fine-tune with a recipe", in_parts=True),
    "assemble": Command("vlv.commands.assemble", "assemble a new model from pretrained parts"),
    "convert": Command("vlv.commands.convert", "convert a checkpoint of the paper's own code"),
    "export": Command("vlv.commands.export", "write each part of a model in its own library's format"),
    "info": Command("vlv.commands.info", "count a model's parameters, part by part"),
    "evaluate": Command("vlv.commands.evaluate", "measure captions and reconstructions"),
    "score": Command("vlv.commands.score", "score how well captions fit their images", in_parts=True),
    "search": Command("vlv.commands.search", "find images by the words of their captions"),
    "publish": Command("vlv.commands.publish", "build the Hub repo of a model, check it, and push it"),
    "serve": Command("vlv.commands.serve", "answer chat completions over HTTP with captions"),
    "app": Command("vlv.commands.app", "caption, rebuild and compose images in the browser"),
    "scenes": Command("vlv.commands.scenes", "draw the demo dataset"),
    "demo": Command("vlv.commands.demo", "caption and rebuild a dozen drawn scenes with the bundled checkpoint"),
}

# Modules that warn, when they are imported, about optional packages that no command needs: bitsandbytes, which Trainer
# imports, about kernels on some processors; transformers about torchvision, when diffusers imports it.
UNASKED = ("bitsandbytes.backends.cpu.ops", "transformers.utils.import_utils")


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: vlv COMMAND [ARGUMENT ...]", "", "commands:", *lines, "", "vlv COMMAND --help tells more about each."]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 2 for wrong input, 130 after Ctrl-C."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name == "--version":
        from vlv import __version__

        print(f"vlv {__version__}")
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        print(f"vlv: error: there is no command {name!r}; {hint}", file=sys.stderr)
        return 2
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not COMMANDS[name].in_parts:
        print(f"vlv {name}: error: it runs in one process: start it without a launcher.", file=sys.stderr)
        return 2
    return run(f"vlv {name}", lambda: import_module(COMMANDS[name].module).main(rest), is_process=argv is None)


def run(name: str, command: Callable[[], int | None], is_process: bool) -> int:
    """
    Run a command and turn its errors into one line.

    Args:
        name: the beginning of the line.
        is_process: the process ends after the command, so Ctrl-C, loggers and stdout may be set for the whole process.
    """
    if is_process:
        for module in UNASKED:
            logging.getLogger(module).setLevel(logging.ERROR)
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # a pipe or a file shows a training's losses while it runs
    if is_process and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        # A terminal sends Ctrl-C to all processes. Processes that the command forks ignore it; the command handles it.
        os.register_at_fork(after_in_child=_ignore_ctrl_c)
    try:
        return command() or 0
    except KeyboardInterrupt as interrupt:
        print(f"\n{name}: interrupted{f': {interrupt}' if interrupt.args else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output, such as head, has ended. stdout gets another target, or Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError) as error:
        print(f"{name}: error: {one_line(error)}", file=sys.stderr)
        return 2
    finally:
        if is_process:
            _ignore_ctrl_c()  # while Python shuts down, Ctrl-C would print a traceback


def _ignore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupt(*_) -> None:
    """
    Handles Ctrl-C. From now on, threads may fail because the process shuts down, so their errors are not printed. A
    second Ctrl-C ends the process at once.
    """
    threading.excepthook = _say_nothing
    sys.unraisablehook = _say_nothing
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    raise KeyboardInterrupt


def _say_nothing(_: object) -> None:
    pass


def one_line(error: Exception) -> str:
    """The error's message on one line. An OSError from the system gives its file and reason."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
