"""The Space repo: the app as it is, its requirements as they are here, and its examples."""

import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from platform import python_version

from huggingface_hub import RepoCard, SpaceCardData

from vlv.images import ImageFile

# A module and a folder at the top, beside the package: imported, they would load gradio.
APP = Path(find_spec("spaces_app").origin)
PAGES = Path(find_spec("vlv_app").origin).parent
# gradio is not here, because it is the Space's SDK, which the README names.
REQUIREMENTS = (
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "numpy",
    "pillow",
    "pillow-heif",  # reads HEIC, which phones take
    "safetensors",
    "torch",
    "transformers",
)


def build_space_repo(folder: Path, model_id: str, files: Sequence[ImageFile], license: str) -> None:
    """
    Write a Space that runs `spaces_app.py` on the model `model_id` into `folder`. The app reads the model's name from
    the README's metadata. The Space gets the versions of this environment, in which the model was checked.

    Raises:
        ValueError: when one of them is not installed here.
    """
    try:
        gradio = version("gradio")
        pinned = [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]
    except PackageNotFoundError as error:
        raise ValueError(
            f"A Space runs with the versions that are installed here, and {error.name} is not: pip install 'vlv[app]'."
        ) from error
    card = SpaceCardData(
        title=f"{model_id.partition('/')[2]} playground",
        sdk="gradio",
        sdk_version=gradio,
        python_version=".".join(python_version().split(".")[:2]),
        app_file=APP.name,
        license=license,
        models=[model_id],
        emoji="🖼️",
        colorFrom="green",
        colorTo="blue",
        short_description="Images to captions and back",
    )
    content = f"---\n{card.to_yaml()}\n---\n\nCaptions, reconstructions and compositions with "
    RepoCard(f"{content}[{model_id}](https://huggingface.co/{model_id}).\n").save(folder / "README.md")
    (folder / "requirements.txt").write_text("\n".join(pinned) + "\n", encoding="utf-8")
    shutil.copyfile(APP, folder / APP.name)
    shutil.copytree(PAGES, folder / PAGES.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "examples").mkdir()
    for file in files:
        shutil.copyfile(file.path, folder / "examples" / Path(file.name).name)
