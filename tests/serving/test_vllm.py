"""
vLLM with our plugin, for real: in an environment of its own, which VLV_VLLM names by its Python (`make test-vllm`).
The captions of its endpoint and of `vlv caption --engine vllm` are those of our own engine.
"""

import copy
import json
import os
import random
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from served import COMPLETIONS, asking, captions_of, contents, data_url

from stopping_vlv import stop_at_repetition
from vlv import bundled_checkpoint
from vlv.models.loading import load_captioner
from vlv.scenes import write_scenes
from vlv.training.lora import LoraSettings, add_adapters, merge_adapters

PYTHON = os.environ.get("VLV_VLLM")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(PYTHON is None, reason="VLV_VLLM names no Python with vLLM: make test-vllm"),
]
NUMBER, REQUESTS, CLIENTS = 256, 200, 16


def environment():
    """That of the tests, but without their PYTHONPATH, and with little memory for vLLM's cache."""
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**ours, "VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("vllm") / "scenes", NUMBER, split="test")


def checkpoint(kind, folder):
    """The bundled model in another shape."""
    model, processor = load_captioner("vlv-tiny", "cpu", "float32")
    if kind == "untied":
        head = model.caption_head
        head.config.tie_word_embeddings = model.config.caption_config.tie_word_embeddings = False
        head.lm_head.weight = torch.nn.Parameter(copy.deepcopy(head.get_input_embeddings().weight.data))
    elif kind == "merged LoRA":
        trained = load_captioner("vlv-tiny", "cpu", "float32")[0]
        add_adapters(trained, {"caption_head"}, LoraSettings(lora_rank=4))
        for name, weight in trained.named_parameters():
            if "lora_B" in name:  # which begin as zeros
                weight.data.normal_(std=0.02)
        model = merge_adapters(model, trained)
    elif kind == "bfloat16":
        model = model.bfloat16()
        model.config.dtype = torch.bfloat16
    elif kind == "never ends":
        stop_at_repetition(model, processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "kind, options, least",
    [
        ("tied", [], 1.0),
        ("untied", [], 1.0),
        ("merged LoRA", [], 1.0),
        ("never ends", [], 1.0),
        ("tied", ["--prefix", "a small", "--repetition_penalty", "1.2"], 1.0),
        ("bfloat16", ["--dtype", "bfloat16"], 0.95),  # the engines round differently, so a word may differ
    ],
    ids=str,
)
def test_captions_of_a_collection(kind, options, least, folder, tmp_path):
    model = str(bundled_checkpoint("vlv-tiny")) if kind == "tied" else checkpoint(kind, tmp_path / "model")
    options = ["--model", model, *options]
    expected = captions_of(folder, tmp_path / "ours.jsonl", *options)
    output = tmp_path / "theirs.jsonl"
    (folder / "broken.png").write_bytes(b"no image")
    try:
        command = [PYTHON, "-m", "vlv", "caption", str(folder), "--output", str(output), "--engine", "vllm", *options]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    finally:
        (folder / "broken.png").unlink()
    assert result.returncode == 0, result.stderr
    rows = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    found = {row["file_name"]: row["text"] for row in rows}
    assert found.keys() == expected.keys() and all(found.values())
    assert sum(found[name] == expected[name] for name in expected) >= least * NUMBER
    (failure,) = map(json.loads, Path(f"{output}.failures.jsonl").read_text().splitlines())
    assert failure["file_name"] == "broken.png"


def test_a_run_of_one_engine_is_continued_by_the_other(folder, tmp_path):
    files = sorted(folder.glob("*.png"))
    output = tmp_path / "captions.jsonl"
    expected = captions_of(folder, tmp_path / "expected.jsonl")
    some = tmp_path / "some"
    some.mkdir()
    for file in files[:40]:
        shutil.copy(file, some)
    captions_of(some, output)
    for file in files[40:60]:
        shutil.copy(file, some)
    command = [PYTHON, "-m", "vlv", "caption", str(some), "--output", str(output), "--engine", "vllm", "--resume"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0 and "20 captioned" in result.stderr, result.stderr
    rows = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    assert {row["file_name"]: row["text"] for row in rows} == {file.name: expected[file.name] for file in files[:60]}


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--num_beams", "4"], "--engine vllm does not follow --num_beams: leave it out, or take --engine local."),
        (["--quantization", "4bit"], "--engine vllm does not follow --quantization"),
    ],
)
def test_options_that_vllm_does_not_follow(options, sentence, folder):
    command = [PYTHON, "-m", "vlv", "caption", str(folder), "--engine", "vllm", *options]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 2 and f"vlv caption: error: {sentence}" in result.stderr


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    port = random.randrange(20_000, 30_000)
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        PYTHON,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(bundled_checkpoint("vlv-tiny")),
        "--port",
        str(port),
    ]
    command += ["--dtype", "float32", "--enforce-eager", "--served-model-name", "vlv-tiny"]
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment(), stdout=output, stderr=output)
        try:
            address = f"http://127.0.0.1:{port}"
            while server.poll() is None:
                try:
                    if httpx.get(f"{address}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(1)
            assert server.poll() is None, log.read_text()
            yield address
        finally:
            server.terminate()
            server.wait()


def test_endpoint(address, folder, tmp_path):
    """200 requests from 16 clients, malformed ones among them: each gets its own answer."""
    expected = captions_of(folder, tmp_path / "captions.jsonl")
    images = {name: data_url((folder / name).read_bytes()) for name in expected}
    names = list(images)[: REQUESTS * 4 // 5]
    two = asking(images[names[0]])
    two["messages"][0]["content"] *= 2
    none = {"messages": [{"role": "user", "content": "hello"}]}
    wrong = {
        "not an image": asking(data_url(b"no image")),
        "two images": two,
        "no image": none,
        "not JSON": b"\0" * 99,
    }
    work = [(name, asking(images[name], temperature=0)) for name in names]
    work += [(name, body) for name, body in wrong.items() for _ in range(REQUESTS // 20)]
    random.Random(0).shuffle(work)
    local = threading.local()

    def send(one):
        name, body = one
        if not hasattr(local, "client"):
            local.client = httpx.Client(base_url=address, timeout=3600)
        content = {"content": body} if isinstance(body, bytes) else {"json": body | {"model": "vlv-tiny"}}
        return name, local.client.post(COMPLETIONS, **content)

    with ThreadPoolExecutor(CLIENTS) as threads:
        answers = list(threads.map(send, work))
    assert len(answers) == REQUESTS
    for name, response in answers:
        if name in wrong:
            assert 400 <= response.status_code < 500, (name, response.text)
            assert "Traceback" not in response.text
        else:
            assert contents(response) == [expected[name]]


def test_streams_several_captions_and_beginnings(address, folder, tmp_path):
    begun = "a small blue"
    name = "000000.png"
    url = data_url((folder / name).read_bytes())
    expected = captions_of(folder, tmp_path / "captions.jsonl")[name]
    with httpx.Client(base_url=address, timeout=3600) as client:
        body = asking(url, model="vlv-tiny", temperature=0, stream=True)
        with client.stream("POST", COMPLETIONS, json=body) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        chunks = map(json.loads, lines[:-1])
        pieces = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
        assert "".join(pieces) == expected and lines[-1] == "[DONE]"
        several = contents(client.post(COMPLETIONS, json=asking(url, model="vlv-tiny", n=3, temperature=2.0)))
        assert len(several) == 3
        (content,) = contents(client.post(COMPLETIONS, json=asking(url, begun, model="vlv-tiny", temperature=0)))
    assert begun + content == captions_of(folder, tmp_path / "begun.jsonl", "--prefix", begun)[name]
