"""The VQA benchmarks' rule for short answers: when two of them are the same, and how right one is."""

import re
from collections.abc import Sequence

ARTICLES = {"a", "an", "the"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
# Words that lose their apostrophe in careless typing; those that are words without it ("well", "were") are left out.
CONTRACTIONS = (
    "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mustn't shouldn't wasn't weren't "
    "won't wouldn't could've might've should've they'd they'll they're they've we've what's where's who's would've "
    "you'd you'll you're you've i'm i've he's she's that's there's let's o'clock y'all"
)
APOSTROPHES = {word.replace("'", ""): word for word in CONTRACTIONS.split()}
JOINED = re.compile(r"(?<=\d),(?=\d)")  # 1,000
STOP = re.compile(r"\.(?!\d)")  # any full stop but that of 3.5
PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!]")


def normalise(answer: str) -> str:
    """
    An answer as the benchmarks compare it: in lower case, without articles and punctuation, numbers up to ten as
    digits, contractions with their apostrophe.
    """
    text = STOP.sub("", JOINED.sub("", answer.lower()))
    found = (DIGITS.get(word, word) for word in PUNCTUATION.sub(" ", text).split() if word not in ARTICLES)
    return " ".join(APOSTROPHES.get(word, word) for word in found)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """
    How right an answer is, 0..1.

    Args:
        references: the one right answer; or those of several annotators (VQA asks ten): then an answer is right when
            three agree with it, and a third less so for each who is missing, on average over leaving one of them out.
    """
    answer, references = normalise(answer), [normalise(reference) for reference in references]
    agree = references.count(answer)
    if len(references) == 1:
        return float(agree)
    # Leaving out one who agrees leaves one fewer; leaving out another changes nothing.
    others = len(references) - agree
    return (agree * min(1, (agree - 1) / 3) + others * min(1, agree / 3)) / len(references)
