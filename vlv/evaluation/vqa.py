"""The rule of the VQA benchmarks for short answers: when two answers are the same, and how right an answer is."""

import re
from collections.abc import Sequence

ARTICLES = {"a", "an", "the"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
# Words that people often write without their apostrophe. "we'll" and "we're" are not here, because "well" and "were"
# are words too.
CONTRACTIONS = (
    "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mustn't shouldn't wasn't weren't "
    "won't wouldn't could've might've should've they'd they'll they're they've we've what's where's who's would've "
    "you'd you'll you're you've i'm i've he's she's that's there's let's o'clock y'all"
)
APOSTROPHES = {word.replace("'", ""): word for word in CONTRACTIONS.split()}
JOINED = re.compile(r"(?<=\d),(?=\d)")  # 1,000
STOP = re.compile(r"\.(?!\d)")  # a full stop, but not the decimal point of 3.5
PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!]")


def normalise(answer: str) -> str:
    """
    An answer in the form that the benchmarks compare: lower case, without articles and punctuation, with digits for
    numbers up to ten, and contractions with their apostrophe.
    """
    text = STOP.sub("", JOINED.sub("", answer.lower()))
    found = (DIGITS.get(word, word) for word in PUNCTUATION.sub(" ", text).split() if word not in ARTICLES)
    return " ".join(APOSTROPHES.get(word, word) for word in found)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """
    How right an answer is, 0..1.

    Args:
        references: the one right answer, or the answers of several annotators (ten in VQA). With several, the accuracy
            is 1 if three agree with the answer, 2/3 for two and 1/3 for one. It is the mean over all sets in which one
            annotator is left out.
    """
    answer, references = normalise(answer), [normalise(reference) for reference in references]
    agree = references.count(answer)
    if len(references) == 1:
        return float(agree)
    # If the annotator who is left out agrees with the answer, one fewer agrees; otherwise as many agree.
    others = len(references) - agree
    return (agree * min(1, (agree - 1) / 3) + others * min(1, agree / 3)) / len(references)
