"""Conversations: their image in every form, the begun caption, and what is refused, in the processor and pipeline."""

import base64
import io
import re
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import tiny
import torch
from transformers.utils.chat_template_utils import render_jinja_template

from chat_vlv import CHAT_TEMPLATE, find_image, is_conversation
from pipeline_vlv import VLVImageTextToTextPipeline
from processing_vlv import VLVProcessor

GREEDY = {"max_new_tokens": 8, "do_sample": False}
WORDS = {"type": "text", "text": "Describe this image as a pirate would."}


@pytest.fixture(scope="module")
def pipe(tiny_model, tiny_processor):
    return VLVImageTextToTextPipeline(model=tiny_model, processor=tiny_processor)


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(content):
    return {"role": "assistant", "content": content}


def image_of(image):
    return {"type": "image", "image": image}


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


# ---- the processor -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["path", "url", "data url", "openai", "openai, plain", "base64", "pil", "image path"])
def test_an_image_in_every_form(form, tiny_processor, tmp_path):
    image = tiny.images(1)[0]
    path = tmp_path / "a b.png"
    image.save(path)
    data = "data:image/png;base64," + png(image)
    part = {
        "path": {"type": "image", "path": str(path)},
        "url": {"type": "image", "url": data},
        "data url": {"type": "image", "image": data},
        "openai": {"type": "image_url", "image_url": {"url": data, "detail": "low"}},
        "openai, plain": {"type": "image_url", "image_url": data},
        "base64": {"type": "image", "base64": png(image)},
        "pil": image_of(image),
        "image path": {"type": "image", "image": str(path)},
    }[form]
    inputs = tiny_processor.apply_chat_template([user(part, WORDS)], tokenize=True, return_dict=True)
    assert torch.equal(inputs["pixel_values"], tiny_processor(images=image)["pixel_values"])
    assert inputs["input_ids"].shape == (1, 0)


def test_an_image_from_a_server(tiny_processor, tmp_path):
    image = tiny.images(1)[0]
    image.save(tmp_path / "picture.png")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        conversation = [user({"type": "image", "url": f"http://127.0.0.1:{server.server_port}/picture.png"})]
        inputs = tiny_processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
        server.shutdown()
    assert torch.equal(inputs["pixel_values"], tiny_processor(images=image)["pixel_values"])


@pytest.mark.parametrize(
    "content", ["a sketch of", [{"type": "text", "text": "a sketch"}, {"type": "text", "text": " of"}]]
)
def test_a_message_of_the_assistant_begins_the_caption(tiny_processor, content):
    image = tiny.images(1)[0]
    conversation = [{"role": "system", "content": "Be brief."}, user(image_of(image), WORDS), assistant(content)]
    inputs = tiny_processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
    expected = tiny_processor(images=image, text="a sketch of")
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert tiny_processor.apply_chat_template(conversation) == "a sketch of"
    assert torch.equal(tiny_processor.apply_chat_template(conversation, tokenize=True), expected["input_ids"])


def test_earlier_answers_begin_nothing(tiny_processor):
    image = tiny.images(1)[0]
    conversation = [user(image_of(image)), assistant("a dog"), {"role": "user", "content": "Now in French."}]
    assert tiny_processor.apply_chat_template(conversation) == ""


def test_several_conversations(tiny_processor):
    images = tiny.images(3)
    begun = ["", "a red", "two small dogs"]
    conversations = [[user(image_of(image)), assistant(text)] for image, text in zip(images, begun, strict=True)]
    inputs = tiny_processor.apply_chat_template(conversations, tokenize=True, return_dict=True, crop="center")
    expected = tiny_processor(images=images, text=begun, crop="center")
    assert expected.keys() == inputs.keys() and all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert tiny_processor.apply_chat_template(conversations) == begun


def test_images_in_lists_of_one(tiny_processor):
    """As code for models of several images passes them."""
    images = tiny.images(2)
    nested = tiny_processor(images=[[image] for image in images], text=["a", "b"])
    assert torch.equal(nested["pixel_values"], tiny_processor(images=images)["pixel_values"])
    with pytest.raises(ValueError, match="There are 2 images for one text: a VLV reads exactly one"):
        tiny_processor(images=[images], text=["a"])


def test_the_template_is_saved_and_old_repos_get_it(tiny_processor, tmp_path):
    tiny_processor.save_pretrained(tmp_path)
    assert VLVProcessor.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATE
    for file in tmp_path.glob("chat_template*"):
        file.unlink()
    assert VLVProcessor.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATE


def test_what_renders_the_template_itself_gets_the_same(tiny_processor):
    """A server, for one: it has placeholders where images were."""

    def render(conversation, **arguments):
        (text,), _ = render_jinja_template([conversation], chat_template=tiny_processor.chat_template, **arguments)
        return text

    assert render([user({"type": "image"}, WORDS)], add_generation_prompt=True) == ""
    begun = [user({"type": "image"}), assistant([{"type": "text", "text": " a dog "}])]
    assert render(begun) == " a dog "
    assert render(begun, continue_final_message=True) == " a dog "


IMAGE = {"type": "image", "url": "a.png"}
REFUSED = {
    "no image": ([user(WORDS)], "This conversation has no images: a VLV reads exactly one"),
    "two images": ([user(IMAGE, IMAGE)], "This conversation has 2 images: a VLV reads exactly one"),
    "an image in each of two turns": ([user(IMAGE), user(IMAGE)], "This conversation has 2 images"),
    "the assistant's image": (
        [assistant([IMAGE])],
        "An image is in a message of 'assistant': put it into one of 'user'",
    ),
    "unknown role": (
        [user(IMAGE), {"role": "tool", "content": ""}],
        "There is no role 'tool': a message is of system, ",
    ),
    "unknown type": ([user(IMAGE, {"type": "video", "url": "a"})], "has the type 'video': this model knows"),
    "no type": ([user({"url": "a.png"})], "has the type None"),
    "a part that is a text": ([user("a.png")], "has the type None"),
    "an image that is nowhere": (
        [user({"type": "image"})],
        "An image has none of image, url, path, base64, image_url",
    ),
    "no content": ([{"role": "user"}], "The content of a message of 'user' is a text or a list of parts, not None"),
    "not messages": (["hello"], "A conversation is a list of messages"),
    "a file that is not there": ([user(IMAGE)], "a.png: there is no such file"),
    "not an image": ([user({"type": "image", "url": "data:image/png;base64,AAAA"})], "not an image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, pipe, tiny_processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    conversation, sentence = REFUSED[case]
    with pytest.raises((ValueError, OSError), match=re.escape(sentence)):
        tiny_processor.apply_chat_template([conversation], tokenize=True, return_dict=True)
    if is_conversation(conversation) and all("content" in message for message in conversation):
        with pytest.raises((ValueError, OSError), match=re.escape(sentence)):
            pipe(conversation, **{"generate_kwargs": dict(GREEDY)})


def test_finding_the_image_reads_nothing():
    assert find_image([user({"type": "image", "url": "http://127.0.0.1:1/nothing.png"})]).endswith("nothing.png")


# ---- the pipeline ------------------------------------------------------------------------------------------


def caption(model, processor, image, text=""):
    ids = model.generate(**processor(images=image, text=text), **GREEDY)
    return processor.tokenizer.decode(ids[0], skip_special_tokens=True)


def test_a_conversation(pipe, tiny_model, tiny_processor):
    image = tiny.images(1)[0]
    conversation = [user(image_of(image), WORDS)]
    (row,) = pipe(conversation, generate_kwargs=dict(GREEDY))
    written = caption(tiny_model, tiny_processor, image)
    assert row["generated_text"] == [*conversation, assistant(written)]
    (row,) = pipe(text=conversation, generate_kwargs=dict(GREEDY), return_full_text=False)
    assert row["generated_text"] == written


@pytest.mark.parametrize("content", ["a sketch of", [{"type": "text", "text": "a sketch of"}]])
def test_a_begun_caption_is_continued(pipe, tiny_model, tiny_processor, content):
    image = tiny.images(1)[0]
    conversation = [user(image_of(image)), assistant(content)]
    (row,) = pipe(conversation, generate_kwargs=dict(GREEDY))
    whole = "a sketch of" + caption(tiny_model, tiny_processor, image, "a sketch of")
    assert row["generated_text"][-1]["content"] == [{"type": "text", "text": whole}]
    assert conversation[1]["content"] == content  # the caller's messages are not changed


def test_batches_of_conversations(pipe, tiny_model, tiny_processor):
    images, begun = tiny.images(4), ["a", "", "two small", ""]
    conversations = [[user(image_of(image)), assistant(text)] for image, text in zip(images, begun, strict=True)]
    expected = [caption(tiny_model, tiny_processor, *pair) for pair in zip(images, begun, strict=True)]
    for batch_size in (1, 4):
        rows = pipe(conversations, batch_size=batch_size, generate_kwargs=dict(GREEDY), return_full_text=False)
        assert [row[0]["generated_text"] for row in rows] == expected


def test_images_without_text(pipe, tiny_model, tiny_processor, tmp_path):
    images = tiny.images(2)
    images[0].save(tmp_path / "a.png")
    expected = [caption(tiny_model, tiny_processor, image) for image in images]
    for one in (images[0], str(tmp_path / "a.png"), tmp_path / "a.png"):
        assert [row["generated_text"] for row in pipe(images=one, generate_kwargs=dict(GREEDY))] == expected[:1]
    rows = pipe(images, generate_kwargs=dict(GREEDY))
    assert [row["generated_text"] for row in rows] == expected


def test_mismatched_arguments_of_the_pipeline(pipe):
    image = tiny.images(1)[0]
    with pytest.raises(ValueError, match="There is no image: give images, or conversations that hold them"):
        pipe(text="a")
    with pytest.raises(ValueError, match="There are 1 images, but 2 texts: give one for each"):
        pipe(images=image, text=["a", "b"])
    with pytest.raises(ValueError, match="Conversations hold their images themselves"):
        pipe(images=image, text=[user(image_of(image))])
