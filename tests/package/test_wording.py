"""What people ask of the words of captions."""

import pytest

from wording_vlv import Wording, clean_tags, cut_to_words, parse_words


@pytest.mark.parametrize(
    "text, most, expected",
    [
        ("One two.", 5, "One two."),
        ("One two. Three four. Five six.", 5, "One two. Three four."),
        ('One "two." Three four five.', 3, 'One "two."'),
        ("Version 1.5 is out. It works.", 4, "Version 1.5 is out."),
        ("one two three, four", 3, "one two three"),
        ("One two three four.", 2, "One two"),
        ("Was it? It was! Well then.", 4, "Was it? It was!"),
    ],
)
def test_captions_are_cut_where_a_sentence_ends(text, most, expected):
    assert cut_to_words(text, most) == expected


@pytest.mark.parametrize("words", ["", "20", "30-20", "0-3", "a-b", "20 - 40x", None, 5])
def test_ranges_that_are_none(words):
    with pytest.raises(ValueError, match="give the least and the most words"):
        parse_words(words)


def test_tags_are_kept_once_in_order():
    assert clean_tags("red circle,  Blue Square,red circle,\nblue square, , mint.") == "red circle, Blue Square, mint"


def test_all_wishes_together():
    wording = Wording("1-3", "ohwx, man", "photo of", "outdoors", clean_tags=True)
    assert wording.finish("dog, man, dog, cat") == "ohwx, man, photo of dog, man outdoors"
    assert Wording(trigger_words="ohwx, man").finish("man, dog") == "ohwx, man, dog"
    assert Wording(caption_prefix="photo of", caption_suffix=".").finish("a dog") == "photo of a dog."
    assert Wording(caption_prefix="photo of").finish("photo of a dog") == "photo of a dog"
    assert Wording().changes_nothing and Wording().finish(" a ") == " a "
