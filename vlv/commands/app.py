"""`vlv app`: the app of `spaces_app.py`, in the browser."""

from argparse import ArgumentParser
from importlib.util import find_spec


def main(argv: list[str]) -> None:
    if find_spec("gradio") is None:
        raise ValueError("The app needs gradio, which is not installed: pip install 'vlv[app]'.")
    # Imported only now, because importing torch and gradio would delay the error above.
    import spaces_app
    from vlv.models.loading import read_config

    # The app loads any repo with its code, as a Space does. What is not a VLV is refused here, before its code is run.
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model", nargs="?")
    if model := parser.parse_known_args(argv)[0].model:
        read_config(model)
    spaces_app.main(argv, prog="vlv app")
