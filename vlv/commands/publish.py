"""`vlv publish`: build the Hub repo of a trained VLV, check that it works without this package, and push it."""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from vlv import find_bundled
from vlv.arguments import CommandParser
from vlv.files import locked

EXAMPLES = Path(__file__).parents[1] / "publish" / "examples"


@dataclass
class PublishArguments:
    repo_id: str = field(metadata={"help": "Name of the model repo on the Hub, user/name."})
    space: str | None = field(
        default=None, metadata={"help": "Also publish the app for it as a Space of this name, user/name."}
    )
    captioner_only: bool = field(
        default=False, metadata={"help": "Leave out the diffusion decoder: a smaller repo that can only caption."}
    )
    license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the weights, as the Hub names it. Required for a VLV with pretrained parts; for one "
            "that was trained from random weights the default is apache-2.0."
        },
    )
    examples: str = field(
        default=str(EXAMPLES),
        metadata={"help": "Folder of pictures for the model card and the Space (default: drawn scenes)."},
    )
    output: str | None = field(
        default=None,
        metadata={"help": "New folder to build in. It is kept. The Space is built beside it, in OUTPUT-space."},
    )
    dry_run: bool = field(default=False, metadata={"help": "Build and check, but push nothing; needs --output."})
    private: bool = field(default=False, metadata={"help": "Make new repos private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push the model to (default: main)."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of pushing to a branch."})
    commit_message: str = field(default="Upload VLV", metadata={"help": "First line of the commits."})

    def __post_init__(self):
        for name in ("repo_id", "space"):
            value = getattr(self, name)
            if value is not None:
                check_name(f"--{name}", value)
        if self.dry_run and self.output is None:
            raise ValueError("--dry_run builds a folder to look at: name it with --output.")
        if self.create_pr and self.revision is not None:
            raise ValueError("--create_pr opens its own branch: leave --revision out.")


def check_name(option: str, name: str) -> None:
    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ValueError(f"{option} {name} is not a name of a Hub repo: it must be user/name.")


def main(argv: list[str]) -> None:
    parser = CommandParser(
        PublishArguments,
        prog="vlv publish",
        description="Build a Hub repo from a trained VLV, check that it works without this package, and push it.",
        epilog="example: vlv publish my_captioner --repo-id me/my-captioner --space me/my-captioner-demo",
    )
    parser.add_argument("model", metavar="MODEL", help="Folder or Hub id of a trained VLV.")
    arguments, inputs = parser.parse(argv)
    with tempfile.TemporaryDirectory() as scratch:
        output = arguments.output or f"{scratch}/model"
        with locked(output, beside=True):
            publish(find_bundled(inputs.model), empty_folder(output), arguments)


def publish(model: str, folder: Path, arguments: PublishArguments) -> None:
    # Imported only now, because importing torch would delay --help and the errors of wrong arguments.
    from vlv.images import find_images
    from vlv.models.loading import read_config
    from vlv.publish.card import weights_license
    from vlv.publish.proof import prove
    from vlv.publish.push import check_token, push
    from vlv.publish.repo import build_model_repo
    from vlv.publish.samples import make_samples
    from vlv.publish.space import build_space_repo

    license = weights_license(read_config(model), arguments.license)
    pictures = find_images([arguments.examples])
    if not arguments.dry_run:
        check_token()  # now, before minutes of work
    say("captioning and rebuilding the examples")
    samples = make_samples(model, pictures, arguments.captioner_only)
    say(f"building {folder}")
    build_model_repo(model, folder, arguments.repo_id, samples, license, arguments.captioner_only)
    say("checking that it works without this package")
    prove(folder, samples)
    space_folder = None
    if arguments.space is not None:
        space_folder = empty_folder(f"{folder}-space")
        build_space_repo(space_folder, arguments.repo_id, pictures, license)
    if arguments.dry_run:
        say("not pushed (--dry_run)")
        return
    settings = {"private": arguments.private or None, "commit_message": arguments.commit_message}
    commit = push(folder, arguments.repo_id, revision=arguments.revision, create_pr=arguments.create_pr, **settings)
    print(commit.pr_url or commit.commit_url)
    if space_folder is not None:
        print(push(space_folder, arguments.space, repo_type="space", **settings).commit_url)


def empty_folder(path: str) -> Path:
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: name a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def say(text: str) -> None:
    print(f"vlv publish: {text}", file=sys.stderr, flush=True)
