"""Pushes a folder to the Hub in one commit."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

# The file that marks a repo as one that this command wrote, so that it may be written again.
MARKS = {"model": "modeling_vlv.py", "space": "spaces_app.py"}
# Earlier weights are deleted. They would be loaded instead of the new ones, or together with them.
STALE = ("*.safetensors", "*.safetensors.index.json")


def check_token() -> None:
    """Raises OSError when the Hub cannot be reached, or when this machine has no valid token."""
    api = HfApi()
    with _hub_errors("the Hub", api.endpoint):
        api.whoami()


def push(
    folder: Path,
    repo_id: str,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload VLV",
) -> CommitInfo:
    """
    Upload a folder as one commit. Nothing is published before all files are uploaded. When an interrupted upload runs
    again, it sends only the missing files; a finished one sends nothing.

    Args:
        private: for a new repo; `None` is the account's default. An existing repo is not changed.
        revision: a branch, which is created if it does not exist; `None` is the main branch.
        create_pr: open a pull request instead of writing to the branch.

    Raises:
        ValueError, OSError: when the Hub cannot be reached or refuses the push; the sentence says what to do.
    """
    api = HfApi()
    with _hub_errors(repo_id, api.endpoint):
        _claim(api, repo_id, repo_type, private)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        new = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        old = api.list_repo_files(repo_id, repo_type=repo_type, revision=None if create_pr else revision)
        stale = [name for name in old if name not in new and any(fnmatch(name, pattern) for pattern in STALE)]
        # upload_folder is not used, because in huggingface_hub 2 it splits a long upload into several commits.
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, str(file)) for name, file in new.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            repo_type=repo_type,
            revision=None if create_pr else revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )


@contextmanager
def _hub_errors(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turns the errors of the Hub's client into one OSError that says what to do."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise OSError("HF_HUB_OFFLINE is set, and a push needs the network: unset it.") from error
    except (LocalTokenNotFoundError, HTTPError, RuntimeError) as error:
        raise OSError(_sentence(error, repo_id, endpoint)) from error


def _claim(api, repo_id, repo_type, private):
    """Create the repo, or make sure that the existing one holds nothing else."""
    if not api.repo_exists(repo_id, repo_type=repo_type):
        sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
        api.create_repo(repo_id, repo_type=repo_type, private=private, **sdk)
        return
    files = set(api.list_repo_files(repo_id, repo_type=repo_type)) - {".gitattributes", "README.md"}
    if files and MARKS[repo_type] not in files:
        raise FileExistsError(
            f"The name {repo_id} is taken: that {repo_type} on the Hub holds something else. Choose another."
        )


def _sentence(error, repo_id, endpoint):
    """What went wrong and how to fix it, in one sentence."""
    while error.__cause__ is not None and not isinstance(error, HTTPError):
        error = error.__cause__  # if several files are sent at once, the failed request is wrapped
    if isinstance(error, LocalTokenNotFoundError):
        return "There is no token for the Hub: run `hf auth login`, or set HF_TOKEN to one with write permission."
    if not isinstance(error, HfHubHTTPError):
        reason = str(error) or type(error).__name__
        return f"{endpoint} cannot be reached ({reason}): nothing was published; run the same command again."
    status = error.response.status_code
    if status == 401:
        source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login`"
        return f"The Hub does not know the token from {source}: get a valid one from {endpoint}/settings/tokens."
    if status == 403:
        return (
            f"Your token may not write to {repo_id}: give it write permission at {endpoint}/settings/tokens, or "
            "choose a name under your own account."
        )
    message = " ".join(str(error.server_message or error).split())
    return f"The Hub answered {status} ({message}): nothing was published; run the same command again."
