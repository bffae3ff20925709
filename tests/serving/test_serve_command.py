"""`vlv serve`: a real process answers over HTTP what `vlv caption` writes, whatever else it is sent."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from served import COMPLETIONS, asking, captions_of, complaint, contents, data_url, running_server

from vlv import BUNDLED
from vlv.cli import main
from vlv.scenes import write_scenes

NUMBER = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("serving") / "scenes", NUMBER, split="test")


@pytest.fixture(scope="module")
def images(folder):
    return {file.name: data_url(file.read_bytes()) for file in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def server():
    with running_server("--max_image_mb", "0.5") as server:
        yield server
        assert server.process.poll() is None  # nothing that a test did has ended it
        assert "Traceback" not in "".join(server.said)


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.address, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def captions(folder, tmp_path_factory):
    return captions_of(folder, tmp_path_factory.mktemp("captions") / "captions.jsonl")


def test_answers_among_malformed_requests_are_what_vlv_caption_writes(client, images, captions):
    """12 clients at once; one request in three is wrong, and some leave in the middle."""
    wrong = {
        "no image": (asking(""), 400),
        "not decodable": (asking(data_url(b"GIF89a" + bytes(40))), 400),
        "a file": (asking("/etc/hostname"), 400),
        "bytes": (random.Random(0).randbytes(1000), 400),
    }
    work = [(name, asking(url), 200) for name, url in images.items()]
    work += [(name, *wrong[name]) for name in wrong for _ in range(3)]
    random.Random(0).shuffle(work)

    def send(one):
        name, body, status = one
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        return name, status, client.post(COMPLETIONS, **content)

    def leave(url):
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{client.base_url}{COMPLETIONS}", json=asking(url, n=8, temperature=1), timeout=0.02)

    with ThreadPoolExecutor(12) as threads:
        left = [threads.submit(leave, url) for url in list(images.values())[:4]]
        answers = list(threads.map(send, work))
        for one in left:
            one.result()
    assert [response.status_code for _, _, response in answers] == [status for _, status, _ in answers]
    told = {name: response.json()["choices"][0] for name, status, response in answers if status == 200}
    assert {name: choice["message"]["content"] for name, choice in told.items()} == captions
    assert {choice["finish_reason"] for choice in told.values()} == {"stop"}
    assert client.get("/health").json() == {"status": "ok"}


def test_models(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == BUNDLED


@pytest.mark.parametrize("begun", [None, "a small"])
def test_stream(client, images, begun):
    url = next(iter(images.values()))
    body = asking(url, begun, stream=True, stream_options={"include_usage": True})
    whole = client.post(COMPLETIONS, json=asking(url, begun)).json()
    with client.stream("POST", COMPLETIONS, json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    *chunks, usage = map(json.loads, lines[:-1])
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert len(list(filter(None, pieces))) > 5  # it came in pieces
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"] == whole["usage"]


def test_an_assistant_message_begins_the_caption(client, folder, images, tmp_path):
    begun = "a small blue"
    expected = captions_of(folder, tmp_path / "captions.jsonl", "--prefix", begun)
    for ending in ("", " "):
        for name, url in list(images.items())[:4]:
            (content,) = contents(client.post(COMPLETIONS, json=asking(url, begun + ending)))
            assert begun + ending + content == expected[name]


def test_length(client, images):
    url = next(iter(images.values()))
    (whole,) = contents(client.post(COMPLETIONS, json=asking(url)))
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.post(COMPLETIONS, json=asking(url, **{name: 5})).json()
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 5
        content = choice["message"]["content"]
        assert whole.startswith(content) and len(content) < len(whole)


def test_draws(client, images):
    url = next(iter(images.values()))

    def draw(**settings):
        return contents(client.post(COMPLETIONS, json=asking(url, temperature=3.0, max_tokens=20, **settings)))

    first = draw(n=3, seed=1)
    assert len(set(first)) == 3
    assert draw(n=3, seed=1) == first != draw(n=3, seed=2)
    assert draw() != draw()  # without a seed, each request has its own


@pytest.mark.parametrize(
    "change, status, sentence",
    [
        ({"messages": []}, 400, "A conversation is a list of messages, each with a role and its content."),
        ({"messages": [{"role": "user", "content": "hello"}]}, 400, "This conversation has no images: a VLV reads"),
        ({"messages": [{"role": "king", "content": "hello"}]}, 400, "There is no role 'king': a message is of system"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, 400, "A part of a message has the type "),
        ({"model": "gpt"}, 404, f"There is no model 'gpt' here: this server has '{BUNDLED}'."),
        ({"n": 2}, 400, "n is 2: give a temperature above 0, which draws different captions."),
        ({"max_tokens": 0}, 400, "max_tokens is wrong: Input should be greater than or equal to 1."),
        ({"temperature": "hot"}, 400, "temperature is wrong: Input should be a valid number"),
        ({"min_tokens": 400}, 400, "min_tokens is 400, but a caption has at most 300 tokens."),
        ({"stop": ["."]}, 400, "stop is not supported by this server: leave it out."),
    ],
)
def test_wrong_fields(client, images, change, status, sentence):
    response = client.post(COMPLETIONS, json=asking(next(iter(images.values()))) | change)
    assert response.status_code == status
    assert complaint(response).startswith(sentence)


@pytest.mark.parametrize(
    "url, status, sentence",
    [
        (5, 400, "The image's url must begin with data:, https:// or http://; no files of the server are read."),
        (data_url(b"no image"), 400, "image: this is not an image that PIL can read."),
        (data_url(b""), 400, "image: "),
        ("http://127.0.0.1:1/a.png", 400, "127.0.0.1 is not a public host: send the image in a data: URL."),
        (data_url(bytes(600_000)), 413, "The image is larger than 0.5 MB, the most that this server takes."),
        (data_url(bytes(5_000_000)), 413, "The request's body is larger than 1.7 MB: an image may have 0.5 MB."),
    ],
)
def test_images_that_are_refused(client, url, status, sentence):
    response = client.post(COMPLETIONS, json=asking(url))
    assert response.status_code == status
    assert complaint(response).startswith(sentence)


def test_two_images_and_a_beginning_that_is_too_long(client, images):
    first, second, *_ = images.values()
    body = asking(first)
    body["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": second}})
    assert complaint(client.post(COMPLETIONS, json=body)).startswith("This conversation has 2 images: ")
    response = client.post(COMPLETIONS, json=asking(first, "a small " * 500))
    assert complaint(response).startswith("The assistant's message is too long: image, message and caption would have")


def test_wrong_addresses(client):
    response = client.get("/v1/completions")
    assert complaint(response).startswith("There is nothing at /v1/completions: this server has /health,")
    assert complaint(client.get(COMPLETIONS)) == "/v1/chat/completions does not take GET requests."


def test_random_bytes_in_place_of_http(server, client):
    host, port = server.address.removeprefix("http://").split(":")
    for seed in range(5):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(random.Random(seed).randbytes(1000) + b"\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 400"
    assert client.get("/health").status_code == 200


def test_a_port_that_is_taken(server):
    port = server.address.rpartition(":")[2]
    command = [sys.executable, "-m", "vlv", "serve", "--port", port]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    expected = f"vlv serve: error: --port {port} of 127.0.0.1 cannot be used (address already in use): choose another."
    assert result.stderr == expected + "\n"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--port", "70000"], "--port is 70000; it must be between 0 and 65535"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid is no address of this machine"),
        (["--timeout", "0"], "--timeout is 0.0; it must be above 0."),
        (["--batch_size", "many"], "--batch_size is many; it must be at least 1, or auto."),
        (["--num_captions", "8", "--best_of", "both"], "vlv serve does not follow --best_of: leave it out."),
        (["--port", "0", "--model", "nowhere"], "There is no folder nowhere."),
    ],
)
def test_wrong_arguments(arguments, sentence, capsys):
    assert main(["serve", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vlv serve: error: {sentence}")


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stopped_server_answers_what_it_has_taken(images, captions, number, status):
    names = list(images)[:8]
    with running_server() as server, httpx.Client(base_url=server.address, timeout=300) as client:
        with ExitStack() as stack:
            answers = []
            for name in names:
                body = asking(images[name], stream=True)
                response = stack.enter_context(client.stream("POST", COMPLETIONS, json=body))
                answers.append(filter(None, response.iter_lines()))
                next(answers[-1])  # the server works on it
            os.kill(server.process.pid, number)
            for name, lines in zip(names, answers, strict=True):
                *chunks, last = (line.removeprefix("data: ") for line in lines)
                pieces = [choice["delta"].get("content", "") for it in chunks for choice in json.loads(it)["choices"]]
                assert ("".join(pieces), last) == (captions[name], "[DONE]")
        assert server.process.wait(60) == status
        assert "Traceback" not in "".join(server.said)
