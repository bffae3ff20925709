"""Chat messages: the image and the beginning of the caption are found, and each mistake is named."""

import pytest

from vlv.serving.messages import Conversation, read_conversation

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
URL = IMAGE["image_url"]["url"]


def user(*content):
    return {"role": "user", "content": list(content)}


def text(words):
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    "messages, expected",
    [
        ([user(IMAGE)], Conversation(URL, None)),
        ([user(text("What is this?"), IMAGE)], Conversation(URL, None)),
        ([{"role": "system", "content": "Be brief."}, user(IMAGE, text("Describe it."))], Conversation(URL, None)),
        ([user(IMAGE), {"role": "assistant", "content": "A sketch of "}], Conversation(URL, "A sketch of ")),
        ([user(IMAGE), {"role": "assistant", "content": [text("A "), text("sketch")]}], Conversation(URL, "A sketch")),
        ([user(IMAGE), {"role": "assistant", "content": ""}], Conversation(URL, None)),
        ([user(IMAGE), {"role": "assistant", "content": "A cat."}, user(text("And?"))], Conversation(URL, None)),
        ([user(text("Look:")), user(IMAGE)], Conversation(URL, None)),
    ],
)
def test_what_a_conversation_shows_and_begins(messages, expected):
    assert read_conversation(messages) == expected


@pytest.mark.parametrize(
    "messages, sentence",
    [
        (None, "messages must be a list that holds a user message with an image."),
        ([], "messages must be a list that holds a user message with an image."),
        ("hello", "messages must be a list that holds a user message with an image."),
        ([1], "messages[0] must be an object with role and content."),
        ([{"role": "user", "content": "hello"}], "The conversation shows no image: give exactly one, as a part of "),
        ([user(IMAGE, IMAGE)], "The conversation shows 2 images: give exactly one, as a part of type image_url."),
        ([user(IMAGE), user(IMAGE)], "The conversation shows 2 images"),
        (
            [{"role": "tool", "content": ""}],
            "messages[0].role is 'tool': choose system, developer, user or assistant.",
        ),
        ([{"content": ""}], "messages[0].role is None"),
        ([{"role": "user", "content": 3}], "messages[0].content must be a text or a list of parts."),
        ([user(IMAGE, {"type": "input_audio"})], "messages[0].content[1].type is 'input_audio': choose text or "),
        ([user("hello")], "messages[0].content[0].type is None"),
        ([user({"type": "image_url", "image_url": None})], "messages[0].content[0].image_url.url must be a string."),
        ([user({"type": "text"})], "messages[0].content[0].text must be a string."),
        (
            [user(IMAGE), {"role": "assistant", "content": [IMAGE]}],
            "messages[1] is the assistant's and shows an image",
        ),
    ],
)
def test_mistakes_are_named(messages, sentence):
    with pytest.raises(ValueError) as error:
        read_conversation(messages)
    assert str(error.value).startswith(sentence)
