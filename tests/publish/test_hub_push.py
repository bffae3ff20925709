"""Pushes with the real client, over HTTP, to a small Hub on the loopback interface."""

import huggingface_hub
import pytest
from hub_server import READ_TOKEN

from vlv.publish.push import push

REPO = "ada/vlv-tiny"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "repo"
    for name, content in {
        "README.md": b"---\nlicense: apache-2.0\n---\n# A card\n",
        "modeling_vlv.py": b"print('code')\n",
        "model-00001-of-00002.safetensors": b"first" * 1000,
        "model-00002-of-00002.safetensors": b"second" * 1000,
        "model.safetensors.index.json": b"{}",
        "tokenizer/tokenizer.json": b"{}",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def content_of(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def pushed(hub, **place):
    """The published files, without those that the Hub itself adds to a new repo."""
    return {name: content for name, content in hub.files(REPO, **place).items() if name != ".gitattributes"}


def test_everything_arrives_in_one_commit(hub, folder):
    commit = push(folder, REPO, private=True, commit_message="The first one")
    repo = hub.repos["models", REPO]
    assert pushed(hub) == content_of(folder)
    assert repo.messages == ["initial commit", "The first one"]
    assert repo.branches["main"] == commit.oid
    assert repo.private


def test_a_second_push_changes_nothing(hub, folder):
    push(folder, REPO)
    uploads, commits = list(hub.uploads), dict(hub.repos["models", REPO].commits)
    push(folder, REPO)
    assert hub.uploads == uploads
    assert hub.repos["models", REPO].commits == commits


def test_new_weights_replace_the_old_ones(hub, folder):
    """If the index of the old shards stayed, the old weights would be loaded."""
    push(folder, REPO)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    (folder / "model.safetensors").write_bytes(b"one file now")
    push(folder, REPO)
    assert pushed(hub) == content_of(folder)


def test_a_branch_is_made_for_a_revision(hub, folder):
    push(folder, REPO, revision="v2")
    assert pushed(hub, revision="v2") == content_of(folder)
    assert pushed(hub) == {}
    push(folder, REPO, revision="v2")


def test_a_pull_request_does_not_change_the_branch(hub, folder):
    commit = push(folder, REPO, create_pr=True)
    assert commit.pr_url == f"{hub.url}/{REPO}/discussions/1"
    assert pushed(hub, revision="refs/pr/1") == content_of(folder)
    assert pushed(hub) == {}


def test_a_space_has_an_sdk(hub, folder):
    push(folder, REPO, repo_type="space")
    assert hub.repos["spaces", REPO].sdk == "gradio"
    assert pushed(hub, kind="spaces") == content_of(folder)


@pytest.mark.parametrize("step", ["preupload", "/lfs/", "commit"])
def test_a_hub_that_fails_halfway_publishes_nothing_and_the_next_push_continues(hub, folder, step):
    requests = []

    def fail(method, path):
        requests.append(path)
        if step != "/lfs/":
            return step in path
        # Two threads may send the two large files at the same time. The one that comes first succeeds.
        return path.startswith(step) and path != next(each for each in requests if each.startswith(step))

    hub.fail = fail
    with pytest.raises(OSError, match="nothing was published") as error:
        push(folder, REPO)
    assert "\n" not in str(error.value)
    assert any(step in path for path in requests)
    assert pushed(hub) == {}

    hub.fail = lambda method, path: False
    push(folder, REPO)
    assert pushed(hub) == content_of(folder)
    assert len(hub.uploads) == len(set(hub.uploads)) == 2  # nothing was sent twice


def test_a_failed_update_leaves_the_earlier_revision(hub, folder):
    push(folder, REPO)
    before = pushed(hub)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"new" * 1000)
    (folder / "modeling_vlv.py").write_bytes(b"print('new code')\n")
    hub.fail = lambda method, path: "/commit/" in path
    with pytest.raises(OSError, match="nothing was published"):
        push(folder, REPO)
    assert pushed(hub) == before


# ---- refusals ----------------------------------------------------------------------------------------------


def refusal(*arguments, **settings):
    with pytest.raises((OSError, ValueError)) as error:
        push(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_a_token(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refusal(folder, REPO)
    assert not hub.repos


def test_with_a_wrong_token(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped")
    assert "does not know the token from HF_TOKEN" in refusal(folder, REPO)


def test_without_write_permission(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert "may not write to ada/vlv-tiny" in refusal(folder, REPO)


def test_under_somebody_elses_name(hub, folder):
    assert "may not write to charles/vlv-tiny" in refusal(folder, "charles/vlv-tiny")


def test_a_name_that_is_taken(hub, folder):
    api = huggingface_hub.HfApi()
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"a different model", path_in_repo="pytorch_model.bin", repo_id=REPO)
    before = hub.files(REPO)
    assert "ada/vlv-tiny is taken" in refusal(folder, REPO)
    assert hub.files(REPO) == before


def test_without_a_network(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in refusal(folder, REPO)


def test_offline(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(folder, REPO)
