"""Prompts and styles, in the processor, the model, the pipelines and conversations."""

import json
import re

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy

from pipeline_vlv import VLVImageTextToTextPipeline, VLVImageToTextPipeline
from processing_vlv import VLVProcessor
from stopping_vlv import WordRange
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding

STYLES = {"short": "Be brief.", "words": "In {words} words."}
# Prompts of different lengths, and an image without any.
PROMPTS = ["what is it?", None, "a", ""]
LENGTH = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture(scope="module")
def processor():
    """As stage 2 leaves it when it was trained with prompts."""
    processor = tiny.processor()
    processor.learn_prompts(STYLES)
    return processor


@pytest.fixture(scope="module")
def images():
    return tiny.images(4)


def written_alone(model, processor, image, prompt):
    """The caption of an image, from the caption head itself: its embeddings after those of prefix and prompt."""
    with torch.no_grad():
        context = model.encode_context(model.encode(processor(images=image)["pixel_values"]))
        ids = processor.tokenizer(f"{prompt}\n" if prompt else "", return_tensors="pt").input_ids.long()
        asked = model.caption_head.get_input_embeddings()(ids)
        embeds = torch.cat([model.prefix_projection(context), asked], dim=1)
        ids = model.caption_head.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **LENGTH, eos_token_id=0, pad_token_id=0
        )
    return processor.batch_decode(ids)[0]


# ---- sequences ---------------------------------------------------------------------------------------------


def test_the_sequence_is_prompt_caption_end(processor):
    tokenizer = processor.tokenizer
    inputs = processor(text=["a cat", "two dogs"], prompt=["why?", None], return_labels=True)
    asked, first, second = (tokenizer(text).input_ids for text in ("why?\n", "a cat", "two dogs"))
    end = [tokenizer.eos_token_id]
    assert inputs["input_ids"][0].tolist() == asked + first + end
    assert inputs["labels"][0].tolist() == [-100] * len(asked) + first + end
    padding = inputs["input_ids"].shape[1] - len(second) - 1
    assert inputs["labels"][1].tolist() == second + end + [-100] * padding
    assert inputs["attention_mask"][1].tolist() == [1] * (len(second) + 1) + [0] * padding


def test_max_length_cuts_the_caption_and_no_prompt(processor):
    inputs = processor(text="a cat", prompt="a long question", max_length=2)
    assert processor.batch_decode(inputs["input_ids"]) == ["a long question\na"]


def test_the_loss_is_that_of_caption_and_end(tiny_model, processor, images):
    pixel_values = processor(images=images[:2])["pixel_values"]
    inputs = processor(text=["a cat", "two dogs"], prompt=["why?", None], return_labels=True)
    with torch.no_grad():
        loss = tiny_model(pixel_values=pixel_values, **inputs).caption_loss
        context = tiny_model.encode_context(tiny_model.encode(pixel_values))
        losses = []
        for row, (asked, said) in enumerate([("why?\n", "a cat"), ("", "two dogs")]):
            before, after = (processor.tokenizer(text).input_ids for text in (asked, said))
            after = torch.tensor([*after, processor.tokenizer.eos_token_id])
            tokens = torch.cat([torch.tensor(before, dtype=torch.long), after])
            words = tiny_model.caption_head.get_input_embeddings()(tokens)[None]
            embeds = torch.cat([tiny_model.prefix_projection(context[row : row + 1]), words], dim=1)
            logits = tiny_model.caption_head(inputs_embeds=embeds).logits[0, -len(after) - 1 : -1]
            losses.append(cross_entropy(logits, after, reduction="none"))
    torch.testing.assert_close(loss, torch.cat(losses).mean())


@pytest.mark.parametrize("beams", [1, 2])
def test_a_batch_of_prompts_gives_each_image_its_own_caption(beams, tiny_model, processor, images):
    pixel_values = processor(images=images)["pixel_values"]
    decoding = Decoding(max_new_tokens=10, num_beams=beams)
    together = Captioner(tiny_model, processor, decoding, 4)("abcd", pixel_values, PROMPTS)
    alone = Captioner(tiny_model, processor, decoding, 1)("abcd", pixel_values, PROMPTS)
    assert [best.text for best, *_ in together] == [best.text for best, *_ in alone]
    if beams == 1:
        pairs = zip(images, PROMPTS, strict=True)
        expected = [written_alone(tiny_model, processor, image, prompt) for image, prompt in pairs]
        assert [best.text for best, *_ in together] == expected
        ids = tiny_model.generate(**processor(images=images, prompt=PROMPTS), **LENGTH)
        assert processor.batch_decode(ids) == expected


def test_prompt_and_beginning_together(tiny_model, processor, images):
    inputs = processor(images=images[0], text="a cat", prompt="why?")
    expected = processor.tokenizer("why?\n").input_ids + processor.tokenizer("a cat").input_ids
    assert inputs["input_ids"].tolist() == [expected]
    decoding = Decoding(max_new_tokens=6, prompt="why?", prefix="a cat")
    ((caption,),) = Captioner(tiny_model, processor, decoding)(["a"], inputs["pixel_values"])
    ids = tiny_model.generate(**inputs, max_new_tokens=6, do_sample=False)
    added = processor.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert caption.text.startswith("a cat") and caption.text.removeprefix("a cat").strip() == added.strip()


# ---- what a checkpoint records ------------------------------------------------------------------------------


def test_a_checkpoint_keeps_its_styles(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    saved = VLVProcessor.from_pretrained(tmp_path)
    assert saved.takes_prompts and saved.styles == STYLES
    assert saved(text="", style="words", words="2-3")["input_ids"].equal(
        processor(text="", prompt="In 2-3 words.")["input_ids"]
    )


def test_a_checkpoint_without_prompts_is_saved_as_before(tiny_processor, tmp_path):
    tiny_processor.save_pretrained(tmp_path)
    assert not {"takes_prompts", "styles"} & json.loads((tmp_path / "processor_config.json").read_text()).keys()


@pytest.mark.parametrize("styles", [["short"], {"short": 1}, {"short": ""}, {1: "a"}])
def test_styles_that_are_none(styles):
    with pytest.raises(ValueError, match="styles (holds a list|gives the style)"):
        VLVProcessor(tiny.caption_tokenizer(), takes_prompts=True, styles=styles)


# ---- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"style": "long"}, "There is no style 'long' in this checkpoint: its styles are short, words."),
        ({"style": "short", "prompt": "why?"}, "Both the prompt 'why?' and the style 'short' are given"),
        ({"style": "words"}, "The style 'words' asks for a number of words"),
        ({"style": "short", "words": "2-3"}, "No prompt of this checkpoint asks for a number of words"),
        ({"prompt": ["why?"] * 3}, "There are 4 images, but 3 prompts"),
        ({"prompt": ["why?", 1, None, None]}, "The prompt 1 is not text"),
    ],
)
def test_wrong_wishes(given, sentence, processor, images):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        processor(images=images, **given)


@pytest.mark.parametrize("given", [{"prompt": "why?"}, {"style": "short"}])
def test_a_checkpoint_that_takes_none_says_so_everywhere(given, tiny_model, tiny_processor, images):
    sentence = r"This checkpoint takes no prompts, and the (prompt 'why\?'|style 'short') is given"
    image_to_text = VLVImageToTextPipeline(model=tiny_model, processor=tiny_processor)
    with_text = VLVImageTextToTextPipeline(model=tiny_model, processor=tiny_processor)
    for ask in (
        lambda: tiny_processor(images=images[0], **given),
        lambda: Captioner(tiny_model, tiny_processor, Decoding(**given)),
        lambda: image_to_text(images[0], **given),
        lambda: with_text(images=images[0], **given),
    ):
        with pytest.raises(ValueError, match=sentence):
            ask()


def test_a_prompt_longer_than_the_context(tiny_model, processor, images):
    positions = tiny_model.config.caption_config.max_position_embeddings
    prompt = "a" * positions
    sentence = (
        f"beside the image, which takes {tiny_model.config.num_queries}, the caption head has {positions} positions"
    )
    with pytest.raises(ValueError, match=sentence):
        tiny_model.generate(**processor(images=images[0], prompt=prompt))
    with pytest.raises(ValueError, match=sentence):
        Captioner(tiny_model, processor, Decoding(prompt=prompt))


# ---- pipelines and conversations ------------------------------------------------------------------------------


def test_pipelines_ask_for_each_image(tiny_model, processor, images):
    expected = [written_alone(tiny_model, processor, *pair) for pair in zip(images, PROMPTS, strict=True)]
    pipe = VLVImageToTextPipeline(model=tiny_model, processor=processor)
    for batch_size in (1, 4):
        rows = pipe(images, prompt=PROMPTS, batch_size=batch_size, max_new_tokens=10)
        assert [row["generated_text"] for (row,) in rows] == expected
    assert pipe(images[0], style="short", max_new_tokens=10) == pipe(images[0], prompt="Be brief.", max_new_tokens=10)
    pipe = VLVImageTextToTextPipeline(model=tiny_model, processor=processor)
    rows = pipe(images, prompt=PROMPTS, max_new_tokens=10)
    assert [row["generated_text"].strip() for row in rows] == expected


@pytest.mark.parametrize("words", ["why?", [{"type": "text", "text": "why?"}], [{"type": "text", "text": " why? "}]])
def test_the_users_words_are_the_prompt(words, tiny_model, processor, images):
    image = {"type": "image", "image": images[0]}
    if isinstance(words, str):
        messages = [{"role": "user", "content": [image]}, {"role": "user", "content": words}]
    else:
        messages = [{"role": "user", "content": [image, *words]}]
    begun = [*messages, {"role": "assistant", "content": "a cat"}]
    assert processor.apply_chat_template(begun) == "why?\na cat"
    inputs = processor.apply_chat_template(begun, tokenize=True, return_dict=True)
    assert inputs["input_ids"].equal(processor(text="a cat", prompt="why?")["input_ids"])
    pipe = VLVImageTextToTextPipeline(model=tiny_model, processor=processor)
    answer = pipe(text=messages, return_full_text=False, max_new_tokens=10)
    assert answer[0]["generated_text"].strip() == written_alone(tiny_model, processor, images[0], "why?")
    with pytest.raises(ValueError, match="Conversations hold their prompt themselves"):
        pipe(text=messages, prompt="where?")


def test_the_last_question_counts(processor, images):
    messages = [
        {"role": "system", "content": "Answer as a pirate."},
        {"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "why?"}]},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "and where?"},
    ]
    assert processor.apply_chat_template(messages) == "and where?\n"


def test_words_that_are_read_over_are_said(tiny_processor, images, caplog, monkeypatch):
    said = []
    monkeypatch.setattr("processing_vlv.logger.warning_once", said.append)
    parts = [{"type": "image", "image": images[0]}, {"type": "text", "text": "why?"}]
    assert tiny_processor.apply_chat_template([{"role": "user", "content": parts}]) == ""
    assert said == ["This checkpoint takes no prompts: the user's words are ignored, and the image is captioned."]


# ---- a number of words ----------------------------------------------------------------------------------------


def test_a_number_of_words_is_asked_for_or_enforced(tiny_model, processor, images):
    pixel_values = processor(images=images[:1])["pixel_values"]

    def caption(**wishes):
        ((caption,),) = Captioner(tiny_model, processor, Decoding(max_new_tokens=40, **wishes))(["a"], pixel_values)
        return caption.text

    assert caption(words="2-3") == caption(prompt="In 2-3 words.") == caption(style="words", words="2-3")
    for words in ("1-1", "1-2"):
        assert 1 <= len(caption(prompt="why?", words=words).split()) <= int(words[-1])


def test_no_caption_ends_before_the_least_words(processor):
    tokenizer, end = processor.tokenizer, processor.tokenizer.eos_token_id
    limit = WordRange((2, 3), tokenizer.decode, [end], [True, False])
    for text, allowed in (("", False), ("a cat", True), ("a big cat is", True)):
        ids = torch.tensor([tokenizer(text).input_ids] * 2, dtype=torch.long)
        scores = torch.randn(2, len(tokenizer), generator=torch.Generator().manual_seed(0))
        limited = limit(ids, scores.clone())
        assert limited[1].equal(scores[1])  # an image that it does not hold for
        assert bool(limited[0, end].isfinite()) == allowed
        if len(text.split()) > 3:
            assert limited[0].argmax() == end
    limit.keep(torch.tensor([1]))
    assert limit(ids[1:], scores[1:].clone()).equal(scores[1:])
