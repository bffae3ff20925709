"""The endpoint's limits, and what becomes of requests when something goes wrong behind it."""

import asyncio
import copy
import threading
from concurrent.futures import CancelledError
from contextlib import contextmanager
from io import BytesIO

import httpx
import pytest
import tiny
from served import COMPLETIONS, asking, complaint, contents, data_url

from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.serving.app import Limits, make_app
from vlv.serving.batching import Batcher, Request
from vlv.serving.service import Service


def image(seed=0):
    content = BytesIO()
    tiny.images(1, seed)[0].save(content, "PNG")
    return data_url(content.getvalue())


@pytest.fixture(scope="module")
def captioner(tiny_model, tiny_processor):
    return Captioner(tiny_model, tiny_processor, Decoding(max_new_tokens=8))


@contextmanager
def serving(captioner):
    service = Service(captioner, "tiny", largest_image=10**6)
    try:
        yield service
    finally:
        service.close()


def send(service, limits, *bodies):
    """The answers to requests that are all sent at once."""

    async def all_at_once():
        transport = httpx.ASGITransport(make_app(service, limits), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60) as client:
            return await asyncio.gather(*(client.post(COMPLETIONS, json=body) for body in bodies))

    return asyncio.run(all_at_once())


def test_too_many_requests(captioner):
    with serving(captioner) as service:
        answers = send(service, Limits(requests=3), *(asking(image(seed)) for seed in range(8)))
        refused = [answer for answer in answers if answer.status_code == 503]
        assert len(refused) == 5
        assert complaint(refused[0]) == "The server is busy with 3 requests: try again later."
        assert refused[0].headers["Retry-After"] == "5"
        assert [answer.status_code for answer in send(service, Limits(requests=3), asking(image()))] == [200]


def test_a_request_that_takes_too_long(captioner, monkeypatch):
    held = threading.Event()
    write = Captioner.write

    def slow(self, *arguments):
        held.wait(60)
        return write(self, *arguments)

    monkeypatch.setattr(Captioner, "write", slow)
    with serving(captioner) as service:
        limits = Limits(seconds=0.5)
        whole, streamed = send(service, limits, asking(image()), asking(image(), stream=True))
        sentence = "The request took more than 0.5 seconds, the most that this server gives."
        assert whole.status_code == 504 and complaint(whole) == sentence
        assert sentence in streamed.text and streamed.text.endswith("data: [DONE]\n\n")
        held.set()
        assert [answer.status_code for answer in send(service, Limits(), asking(image()))] == [200]


def test_a_model_that_fails_harms_no_other_request(captioner, monkeypatch, capsys):
    write = Captioner.write

    def failing(self, *arguments):
        if self.decoding.max_new_tokens == 3:
            raise RuntimeError("a bug")
        return write(self, *arguments)

    monkeypatch.setattr(Captioner, "write", failing)
    with serving(captioner) as service:
        bodies = [asking(image(seed), max_tokens=tokens) for seed in range(3) for tokens in (3, 8)]
        answers = send(service, Limits(), *bodies, asking(image(), max_tokens=3, stream=True))
    assert [answer.status_code for answer in answers] == [500, 200] * 3 + [200]
    assert complaint(answers[0]) == "The server failed to write the caption (a bug)."
    assert "The server failed to write the caption (a bug)." in answers[-1].text
    assert "RuntimeError: a bug" in capsys.readouterr().err  # the server's log has all of it


def test_settings_that_differ_share_no_batch(captioner, tiny_model):
    expected = {}
    for tokens in (4, 8):
        alone = Captioner(tiny_model, captioner.processor, Decoding(max_new_tokens=tokens), 1)
        for seed in range(4):
            pixel_values = captioner.processor(images=tiny.images(1, seed))["pixel_values"]
            expected[tokens, seed] = alone(["a"], pixel_values)[0][0].text
    with serving(captioner) as service:
        keys = list(expected)
        answers = send(service, Limits(), *(asking(image(seed), max_tokens=tokens) for tokens, seed in keys))
    assert [contents(answer) for answer in answers] == [[expected[key]] for key in keys]


def test_waiting_requests_become_one_batch(captioner, monkeypatch):
    """The first batch is held until all others wait: they are then captioned together, without the one cancelled."""
    held, sizes = threading.Event(), []
    write = Captioner.write

    def watched(self, names, embeds, prompts=None):
        sizes.append(len(names))
        held.wait(60)
        return write(self, names, embeds, prompts)

    monkeypatch.setattr(Captioner, "write", watched)
    pixel_values = captioner.processor(images=tiny.images(6))["pixel_values"]
    batcher = Batcher(captioner, batch_size=8)
    requests = [Request(pixels, captioner.decoding, seed="") for pixels in pixel_values]
    first = batcher.submit(requests[0])
    while not sizes:
        pass
    others = [batcher.submit(request) for request in requests[1:]]
    assert others[0].cancel()
    held.set()
    assert [len(future.result(60)) for future in (first, *others[1:])] == [1] * 5
    assert sizes == [1, 4]
    with pytest.raises(CancelledError):
        others[0].result()
    batcher.stop()
    assert not batcher.is_running


@pytest.mark.parametrize("num_captions", [1, 2])
def test_a_caption_is_answered_when_it_has_ended(tiny_model, tiny_processor, num_captions):
    """The shorter a caption, the sooner, though all are of one batch. The captions are those of the batch alone."""
    model = copy.deepcopy(tiny_model)
    model.generation_config.eos_token_id = tiny.caption_tokenizer()("et").input_ids  # captions end at these letters
    drawn = {"temperature": 1.0, "num_captions": num_captions} if num_captions > 1 else {}
    captioner = Captioner(model, tiny_processor, Decoding(max_new_tokens=16, **drawn), 8)
    pixel_values = captioner.processor(images=tiny.images(8))["pixel_values"]
    names = [str(number) for number in range(8)]
    expected = captioner(names, list(pixel_values))
    batcher, order = Batcher(captioner, batch_size=8), []
    batcher._last = (8, 600.0)  # so that the batch waits for all of them
    futures = []
    for name, pixels in zip(names, pixel_values, strict=True):
        request = Request(pixels, captioner.decoding, seed=name)
        request.captions.add_done_callback(order.append)
        futures.append(batcher.submit(request))
    assert [future.result(60) for future in futures] == expected
    batcher.stop()
    lengths = [max(caption.num_tokens for caption in future.result()) for future in order]
    assert lengths == sorted(lengths) and len(set(lengths)) > 2
