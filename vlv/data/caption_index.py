"""Search in captions by words: SQLite's full-text index (FTS5), in memory."""

import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

# Words that say nothing about a picture: they are not searched for.
_EMPTY = "a an and any are at be by for from has have in is it its of on or some that the there to with"
EMPTY = frozenset(_EMPTY.split())
# A run of words of the query counts where a caption has them all with at most so many words between them, and one more
# for each word beyond two.
BETWEEN = 3
LONGEST = 5  # words of a run
# Commas, full stops and "and" part the words of a caption: more of this stand there than fit into a run.
_GAP = " clauseends" * (BETWEEN + LONGEST)


class Found(NamedTuple):
    file_name: str
    text: str
    score: float  # BM25: larger is better; comparable within one search only


class CaptionIndex:
    """
    Args:
        captions: pairs of an image's name and a caption. An image with several captions comes several times.
    """

    def __init__(self, captions: Iterable[tuple[str, str]]):
        self.database = sqlite3.connect(":memory:")
        # The Porter stemmer finds "cats" for "cat".
        columns = "name UNINDEXED, text UNINDEXED, words, tokenize='porter'"
        self.database.execute(f"CREATE VIRTUAL TABLE captions USING fts5({columns})")
        self.database.executemany(
            "INSERT INTO captions VALUES (?, ?, ?)", ((name, text, _parted(text)) for name, text in captions)
        )

    def search(self, query: str, num: int = 10) -> list[Found]:
        """
        The best captions for a query in plain words, at most `num`, the best one first; each image once.

        Captions score for each word of the query (BM25), and again for each run of its words that is close together
        in the caption: "a red circle on the left" prefers one at the top left to a red square beside a circle.
        Commas, full stops and "and" end a run. What is in double quotes must be in the caption as it is.

        Raises:
            ValueError: when the query has no word to search for.
        """
        # Of an image with several captions, the best one counts.
        rows = self.database.execute(
            "SELECT name, text, MIN(rank) AS best FROM (SELECT name, text, rank FROM captions WHERE captions MATCH ?) "
            "GROUP BY name ORDER BY best, name LIMIT ?",
            (match_of(query), num),
        )
        return [Found(name, text, -rank) for name, text, rank in rows]


def match_of(query: str) -> str:
    """The query in SQLite's language; raises ValueError if it has no word."""
    required = [f'"{phrase}"' for phrase in map(_parted, re.findall(r'"([^"]*)"', query)) if phrase]
    runs = [run for clause in _parted(query.lower()).split(_GAP) for run in _runs(clause)]
    if not required and not runs:
        raise ValueError(f"The query {query!r} has no word to search for.")
    wished = " OR ".join(map(_close_together, runs))
    return " AND ".join([*required, *([f"({wished})"] if wished else [])])


def _close_together(run: Sequence[str]) -> str:
    words = " ".join(f'"{word}"' for word in run)
    return f"NEAR({words}, {BETWEEN + max(0, len(run) - 2)})"


def _runs(clause: str) -> Iterator[list[str]]:
    """Its words alone, and two to `LONGEST` of them that follow each other."""
    words = [word for word in clause.split() if word not in EMPTY]
    for length in range(1, min(LONGEST, len(words)) + 1):
        for start in range(len(words) - length + 1):
            yield words[start : start + length]


def _parted(text: str) -> str:
    """Its words alone, with a gap after each part of it."""
    parts = (" ".join(re.findall(r"\w+", part)) for part in re.split(r"[.,;:!?]|\b(?=and\b)", text))
    return f"{_GAP} ".join(filter(None, parts))
