"""`vlv app`: the app of `spaces_app.py`, in the browser."""

from importlib.util import find_spec


def main(argv: list[str]) -> None:
    if find_spec("gradio") is None:
        raise ValueError("The app needs gradio, which is not installed: pip install 'vlv[app]'.")
    # Imported only now, because importing torch and gradio would delay the error above.
    import spaces_app

    spaces_app.main(argv, prog="vlv app")
