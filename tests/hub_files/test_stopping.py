"""A caption head that never learned to end captions: they stop after a repetition, and they are cleaned."""

import copy
import json
import re

import pytest
import tiny
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from modeling_vlv import VLVForConditionalGeneration
from pipeline_vlv import VLVImageTextToTextPipeline, VLVImageToTextPipeline
from processing_vlv import VLVProcessor
from stopping_vlv import RepeatedSentence, clean_caption, find_sentence_ends, stop_at_repetition
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.cli import main

TOKENIZER = tiny.caption_tokenizer()
ENDS = sorted(TOKENIZER.convert_tokens_to_ids(character) for character in ".!?")
LONG = 90
# What the model would write for three images, without end. The first two stop at different places, the third nowhere.
WRITTEN = (
    "a dog runs. it is big. a dog runs. it is big. it is small. " * 3,
    "a red cat. 1.1.1.1. yes. yes. a red cat! a red cat. and then other things follow without any end at all",
    "so many words and no sentence at all, only words and words and words and words and words and words",
)
STOPPED = (
    "a dog runs. it is big. a dog runs. it is big.",  # " a dog runs." is not "a dog runs." to a tokenizer
    "a red cat. 1.1.1.1. yes. yes.",
    WRITTEN[2][:LONG],
)
CLEANED = ("a dog runs. it is big.", "a red cat. 1.1.1.1. yes.", WRITTEN[2][:LONG])


class Dictate(LogitsProcessor):
    """Makes the model write a given text for each image."""

    def __init__(self, texts):
        self.ids = [TOKENIZER(text).input_ids for text in texts]

    def keep(self, rows):
        self.ids = [self.ids[row] for row in rows.tolist()]

    def __call__(self, input_ids, scores):
        beams = len(scores) // len(self.ids)
        forced = torch.full_like(scores, -1e4)
        for row in range(len(scores)):
            forced[row, self.ids[row // beams][input_ids.shape[1]]] = 0
        return forced


@pytest.fixture(scope="module")
def captioner():
    """A model that never ends, and its processor."""
    model, processor = tiny.model(VLVForConditionalGeneration), tiny.processor()
    stop_at_repetition(model, processor)
    return model, processor


@pytest.fixture(scope="module")
def model(captioner):
    return captioner[0]


@pytest.fixture(scope="module")
def processor(captioner):
    return captioner[1]


def the_papers(text):
    """The paper's cleaning of a caption, written independently."""
    if "." in text:
        text = text[: len(text) - text[::-1].index(".")]
    kept, rest = [], text
    while rest:
        end = re.search(r"[.!?](\s+)", rest)
        sentence, rest = (rest[: end.start() + 1], rest[end.end() :]) if end else (rest, "")
        if sentence not in kept:
            kept.append(sentence)
    return " ".join(kept)


# ---- the rule itself ---------------------------------------------------------------------------------------


def test_the_first_repeated_sentence_is_found():
    repetition = RepeatedSentence(ENDS)
    for text, stopped in zip(WRITTEN, STOPPED, strict=True):
        ids = TOKENIZER(text[:LONG]).input_ids
        found = repetition.find(ids)
        if stopped == text[:LONG]:
            assert found is None
        else:
            assert TOKENIZER.decode(ids[:found]) == stopped
            assert repetition.find(ids[: found - 1]) is None


def test_sentence_ends_of_a_tokenizer():
    assert find_sentence_ends(TOKENIZER) == ENDS


@pytest.mark.parametrize(
    "text",
    [
        *WRITTEN,
        *(
            "",
            ".",
            "...",
            "no end",
            "One. Two! Three? Two! One. Fo",
            "A 1.5 m wall.  A 1.5 m wall.\nA wall",
            "Yes! No",
        ),
    ],
)
def test_cleaning_is_what_the_papers_code_does(text):
    assert clean_caption(text) == the_papers(text)


def test_cleaning_keeps_the_space_in_front_of_a_continuation():
    assert clean_caption(" dog. It runs. It runs. It") == " dog. It runs."


# ---- generate ----------------------------------------------------------------------------------------------


def test_generate_stops_each_caption_where_it_repeats_itself(model, processor):
    pixel_values, _ = tiny.pixels(3)
    dictate = LogitsProcessorList([Dictate(WRITTEN)])
    ids = model.generate(pixel_values, logits_processor=dictate, max_new_tokens=LONG, do_sample=False)
    assert ids.shape == (3, LONG)  # the others are padded to the longest
    assert processor.batch_decode(ids) == list(CLEANED)
    first = model.generate(
        pixel_values[:1], logits_processor=LogitsProcessorList([Dictate(WRITTEN[:1])]), max_new_tokens=LONG
    )
    assert TOKENIZER.decode(first[0]) == STOPPED[0]
    assert processor.decode(first[0], skip_special_tokens=False) == STOPPED[0]


def test_beams_stop_too(model, processor):
    ids = model.generate(
        tiny.pixels(1)[0],
        logits_processor=LogitsProcessorList([Dictate(WRITTEN[:1])]),
        max_new_tokens=LONG,
        num_beams=3,
        early_stopping=True,
    )
    assert processor.batch_decode(ids) == [CLEANED[0]]
    assert ids.shape[1] < LONG


class AfterTokens(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 12)


def test_the_callers_criteria_stay_and_the_checkpoints_can_be_switched_off(model):
    pixel_values, _ = tiny.pixels(1)
    arguments = {"logits_processor": LogitsProcessorList([Dictate(WRITTEN[:1])]), "max_new_tokens": LONG}
    ids = model.generate(pixel_values, stopping_criteria=StoppingCriteriaList([AfterTokens()]), **arguments)
    assert ids.shape == (1, 12)
    ids = model.generate(pixel_values, stopping_criteria=StoppingCriteriaList([]), **arguments)
    assert TOKENIZER.decode(ids[0]) == STOPPED[0]
    assert model.generate(pixel_values, sentence_end_ids=None, **arguments).shape == (1, LONG)
    assert model.generate(pixel_values, **arguments).shape == (1, len(STOPPED[0]))  # the model keeps its own


def test_other_models_are_untouched(tiny_model, tiny_processor):
    arguments = {"logits_processor": LogitsProcessorList([Dictate(WRITTEN[:1])]), "max_new_tokens": LONG}
    ids = tiny_model.generate(tiny.pixels(1)[0], **arguments)
    assert tiny_processor.batch_decode(ids) == [WRITTEN[0][:LONG].strip()]


# ---- the checkpoint and its entry points -------------------------------------------------------------------


@pytest.fixture(scope="module")
def repo(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("never_ends")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_it_is_data_of_the_checkpoint(repo, tiny_repo):
    assert VLVForConditionalGeneration.from_pretrained(repo).generation_config.sentence_end_ids == ENDS
    assert VLVProcessor.from_pretrained(repo).clean_captions
    assert GenerationConfig.from_pretrained(repo).sentence_end_ids == ENDS
    assert not hasattr(VLVForConditionalGeneration.from_pretrained(tiny_repo).generation_config, "sentence_end_ids")
    assert not VLVProcessor.from_pretrained(tiny_repo).clean_captions


def test_the_mark_can_be_removed(tmp_path):
    model, processor = tiny.model(VLVForConditionalGeneration), tiny.processor()
    stop_at_repetition(model, processor)
    stop_at_repetition(model, processor, on=False)
    model.save_pretrained(tmp_path)
    assert RepeatedSentence.of(VLVForConditionalGeneration.from_pretrained(tmp_path).generation_config) is None
    assert processor.decode(TOKENIZER("a. a. b").input_ids) == "a. a. b"


def test_the_pipelines(repo):
    model, processor = VLVForConditionalGeneration.from_pretrained(repo), VLVProcessor.from_pretrained(repo)
    dictate = LogitsProcessorList([Dictate(WRITTEN[:1])])
    arguments = {"logits_processor": dictate, "max_new_tokens": LONG}
    caption = VLVImageToTextPipeline(model=model, processor=processor)
    assert caption(tiny.images(1)[0], **arguments) == [{"generated_text": CLEANED[0]}]
    continuer = VLVImageTextToTextPipeline(model=model, processor=processor)
    (row,) = continuer(images=tiny.images(1), text=["here, "], generate_kwargs=arguments)
    assert row["generated_text"] == "here, " + CLEANED[0]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_the_captioner(repo, num_beams, monkeypatch):
    """Which the command, the evaluation and the endpoints use."""
    model, processor = VLVForConditionalGeneration.from_pretrained(repo), VLVProcessor.from_pretrained(repo)
    generate = copy.copy(model.generate)

    def dictated(**arguments):
        arguments["logits_processor"].append(Dictate(WRITTEN))
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", dictated)
    captioner = Captioner(model, processor, Decoding(max_new_tokens=LONG, num_beams=num_beams), 3)
    captions = [best for best, *_ in captioner(["a", "b", "c"], list(tiny.pixels(3)[0]))]
    assert [caption.text for caption in captions] == list(CLEANED)
    assert [caption.num_tokens for caption in captions] == [len(text) for text in STOPPED]
    assert not any(caption.ended for caption in captions)
    prefixed = Captioner(model, processor, Decoding(max_new_tokens=LONG, prefix="No. 5:", num_beams=num_beams), 3)
    captions = [best.text for best, *_ in prefixed(["a", "b", "c"], list(tiny.pixels(3)[0]))]
    assert captions == [f"No. 5: {text}" for text in CLEANED]


def dictating(generate):
    """`generate` of a model that writes the first text, whatever it sees."""

    def dictated(self, *arguments, **settings):
        given = settings.get("logits_processor") or ()
        settings["logits_processor"] = LogitsProcessorList([*given, Dictate(WRITTEN[:1])])
        return generate(self, *arguments, **settings)

    return dictated


def test_the_command(repo, tmp_path, monkeypatch):
    monkeypatch.setattr(VLVForConditionalGeneration, "generate", dictating(VLVForConditionalGeneration.generate))
    tiny.images(1)[0].save(tmp_path / "a.png")
    options = ["--output", str(tmp_path / "captions.jsonl"), "--num_workers", "0", "--max_new_tokens", str(LONG)]
    assert main(["caption", str(tmp_path / "a.png"), "--model", str(repo), *options]) == 0
    assert json.loads((tmp_path / "captions.jsonl").read_text())["text"] == CLEANED[0]


def test_the_app(repo, monkeypatch):
    studio = pytest.importorskip("vlv_app.studio").Studio(str(repo))
    monkeypatch.setattr(type(studio.model), "generate", dictating(type(studio.model).generate))
    writing = studio.caption(tiny.pixels(1)[0], max_new_tokens=LONG)
    with pytest.raises(StopIteration) as finished:
        while True:
            next(writing)
    (caption,) = finished.value.value
    assert caption.text == CLEANED[0]
