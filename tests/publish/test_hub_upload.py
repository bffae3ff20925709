"""`vlv publish` and `hub_upload.py`: the repo that they build, its check, and loading it without this package."""

import inspect
import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from hub_server import WRITE_TOKEN, running_hub
from huggingface_hub import ModelCard, metadata_load
from paths import ROOT
from PIL import Image
from safetensors.torch import load_file

from modeling_vlv import VLVForConditionalGeneration, VLVModel
from vlv.commands import publish
from vlv.images import find_images
from vlv.publish.card import model_card
from vlv.publish.proof import prove
from vlv.publish.repo import build_model_repo
from vlv.publish.samples import make_samples
from vlv.publish.space import build_space_repo

MEASURED = {
    "captions/test/exact": {"value": 0.9871234, "n": 1000, "standard_error": 0.0036},
    "reconstruction/novel/objects_right": {"value": 0.75, "n": 2013, "standard_error": 0.01},
    "empty context/test/objects_right": {"value": 0.01, "n": 1999, "standard_error": 0.002},
}
RESULTS = {"metrics": MEASURED, "num": 1000, "seed": 3, "commit": "abc", "versions": {"torch": "2.13.0"}}
TRAINING = {
    "recipe": {"stage": "caption", "learning_rate": 0.001, "dataset": "ada/photographs"},
    "seed": 7,
    "commit": "0123abc",
    "device": "cuda:0",
    "steps": 4200,
    "seconds": 660.0,
    "log": [],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_model, tiny_processor):
    """A trained VLV with the files of `vlv train` and `vlv evaluate`. Its captions are short to save time."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "training.json").write_text(json.dumps(TRAINING))
    earlier = {**TRAINING, "recipe": {"stage": "vae", "dataset": "/data/scenes"}, "steps": 1000, "commit": None}
    (folder / "training" / "vae").mkdir(parents=True)
    (folder / "training" / "vae" / "training.json").write_text(json.dumps(earlier))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(tiny.images(2)):
        image.save(folder / f"picture-{number}.jpg")
    return folder


@pytest.fixture(scope="module")
def samples(source, pictures):
    return make_samples(str(source), find_images([pictures]))


@pytest.fixture(scope="module")
def built(tmp_path_factory, source, samples):
    folder = tmp_path_factory.mktemp("built")
    build_model_repo(str(source), folder, "ada/vlv-test", samples, "apache-2.0", max_shard_size="200KB")
    return folder


def test_the_repo_is_complete(built, source):
    for name in (
        *("configuration_vlv.py", "modeling_vlv.py", "layers_vlv.py", "components_vlv.py"),
        *("decoders_vlv.py", "families_vlv.py", "diffusion_vlv.py"),
        *("processing_vlv.py", "images_vlv.py", "pipeline_vlv.py", "stopping_vlv.py", "chat_vlv.py"),
        "sampling_vlv.py",
        *("config.json", "generation_config.json", "processor_config.json", "tokenizer.json"),
        *("training.json", "training/vae/training.json"),
        *("LICENSE", "README.md", "results.json", "model.safetensors.index.json"),
    ):
        assert (built / name).is_file(), name
    assert len(list(built.glob("model-*.safetensors"))) > 1
    assert not [file for file in built.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".pyc")]
    config = json.loads((built / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoProcessor", "AutoModel", "AutoModelForImageTextToText"}
    assert {"image-to-text", "image-text-to-text"} <= set(config["custom_pipelines"])
    assert str(source) not in (built / "config.json").read_text()  # no path of this machine is published


def test_the_weights_are_those_of_the_source(built, tiny_model):
    weights = {}
    for file in built.glob("*.safetensors"):
        weights |= load_file(file)
    expected = VLVModel.from_pretrained(built).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tiny_model.state_dict().items())


def test_the_cards_metadata(built):
    card = ModelCard.load(built / "README.md").data
    assert (card.license, card.library_name, card.pipeline_tag) == ("apache-2.0", "transformers", "image-to-text")
    assert (card.language, card.datasets, card.base_model) == ("en", ["ada/photographs"], None)
    results = {(result.dataset_split, result.metric_name): result.metric_value for result in card.eval_results}
    assert results == {("test", "captions: exact"): 0.9871, ("novel", "reconstruction: objects right"): 0.75}


def test_the_card_has_the_records_of_the_checkpoint(built, samples):
    text = (built / "README.md").read_text()
    for sample in samples:
        assert sample.caption in text
        assert f"samples/{sample.name}.png" in text
        assert f"samples/{sample.name}-rebuilt.png" in text
    assert "vlv evaluate --model ada/vlv-test --num 1000 --seed 3" in text
    assert "| captions | test | exact | 0.9871 | 0.0036 | 1000 |" in text
    assert "| caption | 4,200 | 11 | cuda:0 | 7 | `0123abc` | [training.json](training.json) |" in text
    assert text.index("| vae | 1,000 |") < text.index("| caption | 4,200 |")
    assert "learning_rate: 0.001" in text
    assert "It cannot caption photographs." in text
    steps = inspect.signature(VLVModel.reconstruct).parameters["num_inference_steps"].default
    assert f"rebuilt in {steps} steps" in text
    assert "{{" not in text
    assert "{%" not in text
    assert "None" not in text


def test_the_card_has_metrics_on_a_dataset(built, tiny_model, samples, tmp_path):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    measured = {"captions/photographs/bleu_4": {"value": 0.31, "n": 500, "standard_error": None}}
    settings = {"dataset": "ada/photographs", "num": 500, "guidance_scales": [1.0, 2.0]}
    (tmp_path / "results.json").write_text(json.dumps({"metrics": measured, **settings}))
    card = model_card(tmp_path, "ada/vlv-test", tiny_model, samples, "apache-2.0")
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("photographs", "bleu_4", 0.31)
    assert "| captions | photographs | bleu 4 | 0.3100 |  | 500 |" in card.text
    command = "vlv evaluate --model ada/vlv-test --dataset ada/photographs --num 500 --guidance_scales 1.0 2.0"
    assert f"{command} --metrics captions/bleu_4" in card.text


@pytest.mark.slow
def test_the_cards_python_runs(built, pictures, tmp_path):
    """Every Python example of the card runs unchanged, in one process without this package on its path."""
    text = (built / "README.md").read_text().replace('"ada/vlv-test"', repr(str(built)))
    code = "\n".join(part.partition("```")[0] for part in text.split("```python\n")[1:])
    for name in ("picture.png", "first.png", "second.png"):
        Image.open(pictures / "picture-0.jpg").save(tmp_path / name)
    run = subprocess.run(
        [sys.executable, "-P", "-c", code.replace("300", "20")], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert Image.open(tmp_path / "rebuilt.png").size == (32, 32)


def test_pretrained_parts_are_named_and_need_a_licence(source, samples, tmp_path):
    folder = tmp_path / "source"
    model = VLVModel.from_pretrained(source)
    model.config.encoder_config._name_or_path = "florence-community/Florence-2-large"
    model.config.decoder_config["unet"]["_name_or_path"] = "stabilityai/stable-diffusion-2-1-base"
    model.config.caption_config._name_or_path = str(tmp_path)  # a local folder means nothing to other users
    model.save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    with pytest.raises(ValueError, match="florence-community/Florence-2-large.*--license"):
        publish.main([str(folder), "--repo-id", "ada/vlv"])
    (tmp_path / "built").mkdir()
    build_model_repo(str(folder), tmp_path / "built", "ada/vlv", samples, "openrail++")
    card = metadata_load(tmp_path / "built" / "README.md")
    assert card["license"] == "openrail++"
    assert card["base_model"] == ["florence-community/Florence-2-large", "stabilityai/stable-diffusion-2-1-base"]
    text = (tmp_path / "built" / "README.md").read_text()
    assert "CreativeML Open RAIL++-M" in text
    assert str(tmp_path) not in text + (tmp_path / "built" / "config.json").read_text()


# ---- the proof ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_proof_accepts_what_was_built(built, samples):
    prove(built, samples)


@pytest.mark.slow
def test_the_proof_notices_a_missing_code_file(built, samples, tmp_path):
    broken = shutil.copytree(built, tmp_path / "copy")
    (broken / "pipeline_vlv.py").unlink()
    with pytest.raises(ValueError, match="cannot be loaded without this package, so it is not published"):
        prove(broken, samples)


@pytest.mark.slow
def test_the_proof_notices_code_that_needs_this_package(built, samples, tmp_path):
    broken = shutil.copytree(built, tmp_path / "copy")
    code = (broken / "modeling_vlv.py").read_text()
    (broken / "modeling_vlv.py").write_text(f"{code}\ntry:\n    import vlv\nexcept ValueError:\n    pass\n")
    with pytest.raises(ValueError, match="No module named 'vlv'"):
        prove(broken, samples)


@pytest.mark.slow
def test_the_proof_notices_other_weights(built, samples, tmp_path):
    broken = shutil.copytree(built, tmp_path / "copy")
    for file in broken.glob("model*"):
        file.unlink()
    tiny.model(seed=1).save_pretrained(broken)
    with pytest.raises(ValueError, match="is not published: through AutoModel it captions picture-0 as"):
        prove(broken, samples)


# ---- the Space ---------------------------------------------------------------------------------------------


def test_the_space_runs_the_model_that_its_readme_names(tmp_path, pictures, monkeypatch):
    build_space_repo(tmp_path, "ada/vlv-test", find_images([pictures]), "mit")
    front = metadata_load(tmp_path / "README.md")
    assert (front["sdk"], front["app_file"], front["license"]) == ("gradio", "spaces_app.py", "mit")
    assert (tmp_path / "spaces_app.py").read_bytes() == (ROOT / "spaces_app.py").read_bytes()
    requirements = dict(line.split("==") for line in (tmp_path / "requirements.txt").read_text().splitlines())
    assert {"torch", "transformers", "diffusers"} <= set(requirements)
    assert requirements["torch"] == torch.__version__.partition("+")[0]
    assert sorted(file.name for file in (tmp_path / "examples").iterdir()) == ["picture-0.jpg", "picture-1.jpg"]

    gradio = pytest.importorskip("gradio")
    assert front["sdk_version"] == gradio.__version__
    import spaces_app

    monkeypatch.setattr(spaces_app, "HERE", tmp_path)
    assert spaces_app.find_model() == "ada/vlv-test"


# ---- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--repo-id", "no-user"], "--repo_id no-user is not a name of a Hub repo"),
        (["--repo-id", "ada/x", "--space", "ada/x/y"], "--space ada/x/y is not a name of a Hub repo"),
        (["--repo-id", "ada/x", "--dry-run"], "--output"),
        (["--repo-id", "ada/x", "--create-pr", "--revision", "v2"], "leave --revision out"),
        (["--repo-id", "ada/x", "--output", str(ROOT / "tests")], "is not empty"),
        (["--repo-id", "ada/x", "--examples", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_arguments(tiny_repo, arguments, sentence):
    with pytest.raises((OSError, ValueError)) as error:
        publish.main([str(tiny_repo), *arguments])
    assert sentence in str(error.value)


def test_a_missing_token_is_an_error_before_any_work(source, pictures, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("vlv.publish.samples.make_samples", lambda *_: pytest.fail("The examples were captioned."))
    with pytest.raises(OSError, match="There is no token for the Hub: run `hf auth login`"):
        publish.main([str(source), "--repo-id", "ada/x", "--examples", str(pictures)])


def test_a_model_that_is_not_a_vlv_is_refused(tmp_path):
    with pytest.raises((OSError, ValueError), match="config.json|no folder"):
        publish.main([str(tmp_path), "--repo-id", "ada/x"])


LOAD = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
repo, picture = sys.argv[1:]
auto_class = AutoModel if repo.endswith("whole") else AutoModelForImageTextToText
model = auto_class.from_pretrained(repo, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
ids = model.generate(**processor(images=picture), max_new_tokens=40, do_sample=False)
Path("caption.txt").write_text(processor.batch_decode(ids)[0])
save_file({name: weight.clone().contiguous() for name, weight in model.state_dict().items()}, "weights.safetensors")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "captioner"])
def test_from_a_checkpoint_to_a_users_cold_cache(source, pictures, tmp_path, name):
    """The command as a user runs it, then `from_pretrained("user/name")` with an empty cache."""
    options = ["--captioner-only"] if name == "captioner" else ["--space", "ada/demo", "--private"]
    with running_hub() as hub:
        environment = {
            **os.environ,
            **{"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE_TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
        }
        command = [str(source), "--repo-id", f"ada/{name}", "--examples", str(pictures), *options]
        run = subprocess.run(
            [sys.executable, str(ROOT / "hub_upload.py"), *command], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert f"{hub.url}/ada/{name}/commit/" in run.stdout
        if name == "whole":
            assert hub.repos["models", "ada/whole"].private
            assert "models:\n- ada/whole\n" in hub.files("ada/demo", kind="spaces")["README.md"].decode()

        picture = str(pictures / "picture-1.jpg")
        run = subprocess.run(
            [sys.executable, "-P", "-c", LOAD, f"ada/{name}", picture],
            env={**environment, "HF_HOME": str(tmp_path / "cold")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
    model = (VLVModel if name == "whole" else VLVForConditionalGeneration).from_pretrained(source)
    ids = model.generate(**tiny.processor()(images=picture), max_new_tokens=40, do_sample=False)
    assert (tmp_path / "caption.txt").read_text() == tiny.processor().batch_decode(ids)[0]
    weights, expected = load_file(tmp_path / "weights.safetensors"), model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[key]) for key, weight in weights.items())
