"""From pixels to captions: the batch does not change them, memory sets its size, and the settings work."""

import copy
import re

import pytest
import tiny
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, StaticCache

from vlv.captioning import batches as batches_module
from vlv.captioning.captioner import Captioner
from vlv.captioning.decoding import Spelling
from vlv.captioning.settings import Decoding

COUNT, LENGTH = 8, 16
NAMES = [f"{number}.png" for number in range(COUNT)]


@pytest.fixture(scope="module")
def pixel_values():
    return list(tiny.pixels(COUNT)[0])


@pytest.fixture(scope="module")
def model(tiny_model):
    """Its captions end with an e or a t, at different lengths, and the padding token is an ordinary letter."""
    model = copy.deepcopy(tiny_model)
    letters = tiny.caption_tokenizer()("etz").input_ids
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = letters[:2], letters[2]
    return model


class _Texts(Captioner):
    """Returns only the texts of the captions."""

    def __call__(self, *arguments):
        return [[caption.text for caption in captions] for captions in super().__call__(*arguments)]


def _captioner(model, batch_size=COUNT, **decoding):
    return _Texts(model, tiny.processor(), Decoding(**{"max_new_tokens": LENGTH, **decoding}), batch_size)


@pytest.fixture(scope="module")
def greedy(model, pixel_values):
    return [text for (text,) in _captioner(model)(NAMES, pixel_values)]


DECODINGS = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "all beams": {"num_beams": 3, "num_captions": 3},
    "drawn": {"temperature": 1.5, "top_p": 0.9, "num_captions": 2, "seed": 3},
    "prefix": {"prefix": "a sketch of", "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "forced": {"force_words": ["dog", "cow"], "ban_words": ["a"], "num_beams": 2},
}


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
def test_the_batch_changes_nothing(model, pixel_values, decoding):
    alone = _captioner(model, 1, **decoding)(NAMES, pixel_values)
    assert len({texts[0] for texts in alone}) > COUNT // 2  # otherwise the comparison would mean nothing
    for batch_size in (3, COUNT):
        assert _captioner(model, batch_size, **decoding)(NAMES, pixel_values) == alone
    order = torch.randperm(COUNT).tolist()
    shuffled = _captioner(model, 5, **decoding)([NAMES[i] for i in order], [pixel_values[i] for i in order])
    assert shuffled == [alone[i] for i in order]


def test_captions_of_the_leading_queries(model, pixel_values, greedy):
    embeds = model.encode(torch.stack(pixel_values))
    expected = _texts_of(model, embeds[:, :2])
    assert _captioner(model, num_queries=2)(NAMES, pixel_values) == expected
    assert [text for (text,) in expected] != greedy
    with pytest.raises(ValueError, match=r"num_queries is 11, but this checkpoint has 10 queries"):
        _captioner(model, num_queries=11)


def _texts_of(model, embeds):
    written = Captioner(model, tiny.processor(), Decoding(max_new_tokens=LENGTH)).write(NAMES, embeds)
    return [[caption.text for caption in captions] for captions in written]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_have_no_padding(model, pixel_values, num_beams):
    """Compared with the model on one image at a time, which has no padding."""
    expected = []
    for pixels in pixel_values:
        ids = model.generate(pixels[None], max_new_tokens=LENGTH, num_beams=num_beams)[0].tolist()
        ends = [place for place, token in enumerate(ids) if token in model.generation_config.eos_token_id]
        expected.append([tiny.caption_tokenizer().decode(ids[: ends[0] if ends else None]).strip()])
    captions = _captioner(model, num_beams=num_beams)(NAMES, pixel_values)
    assert captions == expected
    if num_beams == 1:
        assert len({len(text) for (text,) in captions}) > 2  # they end at different lengths


def test_captions_that_have_ended_leave_the_batch(model, pixel_values):
    ids = model.generate(torch.stack(pixel_values), max_new_tokens=LENGTH)
    ends = torch.isin(ids, torch.tensor(model.generation_config.eos_token_id)).cumsum(1)
    rows = []
    handle = model.caption_head.register_forward_hook(lambda _, inputs, output: rows.append(len(output.logits)))
    try:
        _captioner(model)(NAMES, pixel_values)
    finally:
        handle.remove()
    assert rows == [COUNT, *(ends[:, :-1] == 0).sum(0).tolist()]
    assert rows[-1] < rows[0]


@pytest.mark.parametrize("decoding", ["greedy", "beams", "drawn", "prefix"])
def test_a_static_cache_changes_nothing(model, pixel_values, decoding):
    caches = []
    handle = model.caption_head.register_forward_hook(
        lambda _, inputs, options, output: caches.append(type(options["past_key_values"])), with_kwargs=True
    )
    settings = Decoding(max_new_tokens=LENGTH, **DECODINGS[decoding])
    try:
        captions = _Texts(model, tiny.processor(), settings, COUNT, compile=True)(NAMES, pixel_values)
    finally:
        handle.remove()
    assert set(caches) == {StaticCache}
    assert captions == _captioner(model, **DECODINGS[decoding])(NAMES, pixel_values)


# ---- the size of the batch ---------------------------------------------------------------------------------


@pytest.fixture
def batches(model, monkeypatch):
    """The sizes of the batches that the model encodes. It has memory for at most `batches.limit` images."""

    class Batches(list):
        limit = COUNT

    sizes = Batches()
    encode = model.encode

    def limited(pixel_values, num_queries=None):
        sizes.append(len(pixel_values))
        if len(pixel_values) > sizes.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return encode(pixel_values)

    monkeypatch.setattr(model, "encode", limited)
    return sizes


@pytest.mark.parametrize("limit, sizes", [(8, [8]), (3, [8, 4, 2, 2, 2, 2]), (1, [8, 4, 2] + [1] * 8)])
def test_out_of_memory_halves_the_batch(model, pixel_values, greedy, batches, limit, sizes):
    batches.limit = limit
    captioner = _captioner(model)
    assert [text for (text,) in captioner(NAMES, pixel_values)] == greedy
    assert batches == sizes
    assert captioner.batch_size == min(limit, 2) or limit == 8  # the next batch starts with a size that fits


def test_not_even_one_image_fits(model, pixel_values, batches):
    batches.limit = 0
    with pytest.raises(ValueError, match="Not even one image at a time fits into memory"):
        _captioner(model)(NAMES, pixel_values)


def test_other_errors_are_not_taken_for_lack_of_memory(model, pixel_values, monkeypatch):
    monkeypatch.setattr(model, "encode", lambda pixel_values, num_queries=None: torch.zeros(2, 3) @ torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        _captioner(model)(NAMES, pixel_values)


@pytest.mark.parametrize("per_image, size", [(1, 8), (15, 5), (1000, 2)])
def test_automatic_batches_grow_as_far_as_memory_allows(
    model, pixel_values, greedy, batches, monkeypatch, per_image, size
):
    """100 bytes are free, a part of which is kept free. An image takes `per_image` bytes."""
    monkeypatch.setattr(batches_module, "FIRST_BATCH", 2)
    monkeypatch.setattr(batches_module, "LARGEST_BATCH", {"cpu": COUNT})
    monkeypatch.setattr(batches_module, "free_memory", lambda device: 100)
    monkeypatch.setattr(batches_module, "memory_in_use", lambda device: 7)
    monkeypatch.setattr(batches_module, "peak_memory", lambda device: 7 + per_image * batches[-1])
    captioner = _captioner(model, None)
    for _ in range(4):
        assert [text for (text,) in captioner(NAMES, pixel_values)] == greedy
    assert captioner.batch_size == max(batches) == size
    assert batches[0] == 2


# ---- the settings ------------------------------------------------------------------------------------------


def test_an_image_is_encoded_once_for_several_captions(model, pixel_values, batches):
    captions = _captioner(model, num_captions=3, temperature=2.0)(NAMES[:2], pixel_values[:2])
    assert [len(set(texts)) for texts in captions] == [3, 3]
    assert batches == [2]


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3}, {"temperature": 1.0, "num_captions": 2}], ids=str)
def test_no_projection_of_the_prefix_to_the_vocabulary(model, pixel_values, decoding):
    projected = []
    handle = model.caption_head.lm_head.register_forward_hook(
        lambda _, inputs, output: projected.append(output.shape[1])
    )
    try:
        _captioner(model, prefix="a sketch", **decoding)(NAMES[:2], pixel_values[:2])
    finally:
        handle.remove()
    assert set(projected) == {1}


def test_prefix_is_continued(model, pixel_values):
    prefix = "a sketch of"
    captions = _captioner(model, prefix=prefix)(NAMES, pixel_values)
    ids = torch.tensor([tiny.caption_tokenizer()(prefix).input_ids])
    for pixels, (text,) in zip(pixel_values, captions, strict=True):
        new = model.generate(pixels[None], input_ids=ids, max_new_tokens=LENGTH)[0].tolist()
        ends = [place for place, token in enumerate(new) if token in model.generation_config.eos_token_id]
        new = tiny.caption_tokenizer().decode(new[: ends[0] if ends else None])
        assert text == (f"{prefix} {new}" if new[:1].isalnum() else prefix + new).strip()


def _tokenizer_of_words():
    """As in Llama and T5: ▁ stands for a space, and the space before the first token is dropped."""
    words = ["<unknown>", "<end>", "▁a", "▁tree", "▁of", "a", "s", ","]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.mark.parametrize(
    "prefix, continuation, text",
    [
        ("a", "tree", "a tree"),
        ("a", " tree", "a tree"),
        ("a ", "tree", "a tree"),
        ("a ", " tree", "a tree"),
        ("a", ", tree", "a, tree"),
        ("Photo:", "tree", "Photo: tree"),
        ("Photo - ", "tree", "Photo - tree"),
        ("a (", "tree)", "a (tree)"),
        ("l'", "arbre", "l'arbre"),
        ("一张", "图片", "一张图片"),
        ("a", "", "a"),
        ("", "tree", "tree"),
    ],
)
def test_no_word_runs_into_the_prefix(prefix, continuation, text):
    tokenizer = tiny.caption_tokenizer()
    spelling = Spelling(Decoding(prefix=prefix), tokenizer, [tokenizer.eos_token_id])
    assert spelling.text([*tokenizer(continuation).input_ids, tokenizer.eos_token_id, 5, 5]) == text


def test_words_stay_apart_with_a_tokenizer_that_drops_the_first_space():
    tokenizer = _tokenizer_of_words()
    end = tokenizer.eos_token_id
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.get_vocab()}
    spelling = Spelling(Decoding(prefix="a tree"), tokenizer, [end])
    assert spelling.text([ids["▁of"], ids["▁a"], end]) == "a tree of a"
    assert spelling.text([ids["a"], ids["s"]]) == "a tree as"
    assert spelling.text([ids[","], ids["▁a"]]) == "a tree, a"
    words = Spelling(Decoding(force_words=["tree"]), tokenizer, [end])
    words.joints.add((ids["▁a"], ids["▁tree"]))
    assert words.text([ids["▁a"], ids["▁tree"], ids["a"], ids["s"]]) == "a tree as"
    assert words.text([ids["▁of"], ids["▁tree"], ids["s"]]) == "of trees"  # the model's own word


def test_length(model, pixel_values, greedy):
    captions = _captioner(model, min_new_tokens=8, max_new_tokens=12)(NAMES, pixel_values)
    for before, (after,) in zip(greedy, captions, strict=True):  # every letter is a token
        assert 8 <= len(after) <= 12
        assert after[: len(before)] == before[:12]
    assert min(map(len, greedy)) < 8 and max(map(len, greedy)) > 12


@pytest.mark.parametrize("num_beams", [1, 3])
def test_forced_words(model, pixel_values, greedy, num_beams):
    words = ["dog", "big cow"]  # without the letters that end captions
    captions = _captioner(model, force_words=words, max_new_tokens=40, num_beams=num_beams)(NAMES, pixel_values)
    for text, before in zip((text for (text,) in captions), greedy, strict=True):
        assert all(re.search(rf"\b{word}\b", text) for word in words)
        if num_beams == 1 and len(before) < LENGTH:
            assert text.startswith(before)  # the text before the end of the caption does not change
    # Also if the caption has no room for more tokens.
    tight = _captioner(model, force_words=["dog", "cow"], max_new_tokens=8, num_beams=num_beams)(NAMES, pixel_values)
    assert [text for (text,) in tight] == ["dog cow"] * COUNT


def test_forced_words_that_a_caption_already_has_change_nothing(model, pixel_values):
    prefix = {"prefix": "A Dog: "}
    free = _captioner(model, **prefix)(NAMES, pixel_values)
    assert _captioner(model, **prefix, force_words=["dog"])(NAMES, pixel_values) == free
    assert _captioner(model, **prefix, force_words=["do"])(NAMES, pixel_values) != free


def test_banned_words(tiny_model, pixel_values):
    before = [text for (text,) in _captioner(tiny_model, max_new_tokens=40)(NAMES, pixel_values)]
    pairs = [text[start : start + 2] for text in before for start in range(len(text) - 1)]
    banned = sorted({pair for pair in pairs if pair.isalpha()}, key=pairs.count)[-3:]
    after = [text for (text,) in _captioner(tiny_model, max_new_tokens=40, ban_words=banned)(NAMES, pixel_values)]
    assert any(word in text for word in banned for text in before)
    assert not any(word in text for word in banned for text in after)


def test_repetition_control(tiny_model, pixel_values):
    def repeated(**decoding):
        captions = _captioner(tiny_model, max_new_tokens=40, **decoding)(NAMES, pixel_values)
        pairs = [[text[start : start + 2] for start in range(len(text) - 1)] for (text,) in captions]
        return sum(len(pair) - len(set(pair)) for pair in pairs)

    free = repeated()
    assert repeated(repetition_penalty=1.5) < free
    assert repeated(no_repeat_ngram_size=2) == 0 < free


def test_draws_follow_the_temperature_the_seed_and_the_name(model, pixel_values, greedy):
    def draw(names=NAMES, **decoding):
        return [text for (text,) in _captioner(model, **decoding)(names, pixel_values)]

    assert draw(temperature=1e-4) == greedy
    assert draw(temperature=5.0, top_p=1e-6) == greedy
    assert draw(temperature=2.0) == draw(temperature=2.0)
    assert draw(temperature=2.0) != draw(temperature=2.0, seed=1)
    assert draw(temperature=2.0) != draw([f"other {name}" for name in NAMES], temperature=2.0)
    torch.manual_seed(5)  # the global generator does not matter
    assert draw(temperature=2.0) == draw(temperature=2.0)


def test_draws_have_the_models_probabilities(model, pixel_values):
    """The first token of many draws for one image, compared with the softmax of its logits."""
    draws, temperature = 3000, 2.0
    decoding = {"temperature": temperature, "num_captions": draws, "max_new_tokens": 1, "prefix": "("}
    ((*texts,),) = _captioner(model, **decoding)(["a.png"], pixel_values[:1])
    prefix = torch.tensor([tiny.caption_tokenizer()("(").input_ids])
    with torch.no_grad():
        logits = model(pixel_values[0][None], input_ids=prefix).logits[0, -1]
    probabilities = (logits / temperature).softmax(-1)
    letters = tiny.caption_tokenizer()("abcdfg").input_ids
    for letter, token in zip("abcdfg", letters, strict=True):
        expected = float(probabilities[token])
        error = (expected * (1 - expected) / draws) ** 0.5
        assert abs(texts.count(f"({letter}") / draws - expected) < 5 * error + 1e-9


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_caption_knows_whether_it_ended(model, pixel_values, num_beams):
    """The result is compared with `generate` on each image alone."""
    for length in (3, LENGTH):
        decoding = Decoding(max_new_tokens=length, num_beams=num_beams)
        captions = Captioner(model, tiny.processor(), decoding, 5)(NAMES, pixel_values)
        ends = set(model.generation_config.eos_token_id)
        for pixels, (caption,) in zip(pixel_values, captions, strict=True):
            ids = model.generate(pixels[None], max_new_tokens=length, num_beams=num_beams)[0].tolist()
            assert caption.ended == bool(ends & set(ids))


def test_images_are_captioned_as_their_pixels_are(model):
    processor = tiny.processor()
    images = [(f"{size}.png", Image.new("RGB", (size, 20), (size * 9, 90, 200))) for size in range(9, 16)]
    captioner = Captioner(model, processor, Decoding(max_new_tokens=LENGTH), 3)
    pixel_values = [processor(images=image)["pixel_values"][0] for _, image in images]
    expected = captioner([name for name, _ in images], pixel_values)
    assert list(captioner.caption_images(images)) == [
        (name, captions) for (name, _), captions in zip(images, expected, strict=True)
    ]
