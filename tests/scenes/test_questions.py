"""The pairs of prompts and answers about a scene: each answer is checked against the scene itself."""

import json
import re
from dataclasses import fields

import numpy as np
import pytest

from vlv.evaluation.questions import read_questions
from vlv.scenes import world, write_scenes
from vlv.scenes.artwork import Artwork
from vlv.scenes.emoji import EmojiScene, EmojiWorld, Thing
from vlv.scenes.questions import NONE, NOTHING, NUMBERS, STYLES, ask


def check(asked, scene, drawn):
    """What a person would find: each answer against the objects of the scene."""
    prompt, answer = asked.prompt, asked.answer
    objects = [{field.name: getattr(item, field.name) for field in fields(item)} for item in scene.objects]
    phrases = [" ".join(value for name, value in item.items() if name != "place") for item in objects]
    if asked.kind in ("caption", "full"):
        assert drawn.parse_caption(answer) == scene
    elif asked.kind == "short":
        assert re.split(" and ", answer) == [f"a {phrase}" for phrase in phrases]
    elif asked.kind == "tags":
        tags = answer.split(", ")
        assert len(tags) == len(set(tags)) and set(tags) == {*phrases, f"{scene.background} background"}
    elif asked.kind == "words":
        least, most = map(int, re.findall(r"\d+", prompt))
        assert least <= len(answer.split()) <= most
        assert all(phrase in answer for phrase in phrases)
    elif match := re.fullmatch(r"What is at the (.+)\?", prompt):
        there = [f"a {phrase}" for phrase, item in zip(phrases, objects, strict=True) if item["place"] == match[1]]
        assert answer == (there[0] if there else NOTHING)
    elif match := re.fullmatch(r"How many (?:(\S+) )?(?:shape|thing)s are there\?", prompt):
        assert answer == NUMBERS[sum(match[1] is None or match[1] in item.values() for item in objects)]
    elif match := re.fullmatch(r"Is there a (.+)\?", prompt):
        assert answer == ("yes" if match[1] in phrases else "no")
    elif prompt == "What colour is the background?":
        assert answer == scene.background
    elif match := re.fullmatch(r"What (\w+) is the (.+)\?", prompt):
        there = {item[match[1]] for item in objects if item[drawn.subject] == match[2]}
        assert {answer} == (there or {NONE})
    else:
        match = re.fullmatch(r"Which (?:shape|thing) is (.+)\?", prompt)
        there = {item[drawn.subject] for item in objects if match[1] in item.values()}
        assert {answer} == (there or {NONE})
    if asked.choices:
        assert answer in asked.choices and len(set(asked.choices)) == len(asked.choices)


@pytest.mark.parametrize("name", ["shapes", "emoji"])
def test_the_answers_are_true(name):
    drawn = world(name)
    kinds = set()
    for index in range(150):
        scene = drawn.sample_scene("test", index)
        for asked in ask(scene, drawn, np.random.default_rng(index)):
            check(asked, scene, drawn)
            kinds.add(asked.kind)
    assert kinds >= {"caption", *STYLES, "place", "count", "yes or no", "size", "name", "background", "refusal"}


def test_yes_and_no_are_equally_often_right():
    drawn = world("shapes")
    answers = [
        asked.answer
        for index in range(50)
        for asked in ask(drawn.sample_scene("test", index), drawn, np.random.default_rng(index))
        if asked.kind == "yes or no"
    ]
    assert answers.count("yes") == answers.count("no") == 50


def test_nothing_is_asked_that_would_be_absent_where_all_there_is_is_shown():
    drawn = EmojiWorld(Artwork(("robot",), {"ada": "public domain"}, {}))
    scene = EmojiScene((Thing("small", "robot", "top left"), Thing("large", "robot", "top right")), "mint")
    asked = ask(scene, drawn, np.random.default_rng(0))
    assert [it.answer for it in asked if it.kind == "yes or no"] == ["yes"]
    for it in asked:
        check(it, scene, drawn)


def test_a_folder_with_prompts(tmp_path):
    drawn = world("shapes")
    write_scenes(tmp_path, 5, split="validation", prompts=True)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        scene = drawn.sample_scene("validation", index)
        assert row["file_name"] == f"{index:06}.png" and len(row["text"]) == len(row["prompt"])
        asked = dict(zip(row["prompt"], row["text"], strict=True))
        assert asked[""] == scene.caption and STYLES["tags"] in asked
        assert row["short"] == list(scene.short_captions())
    assert json.loads((tmp_path / "styles.json").read_text()) == STYLES
    questions = read_questions(str(tmp_path / "questions.jsonl"))
    assert {question.image for question in questions} == {row["file_name"] for row in rows}
    asked = dict(zip(rows[1]["prompt"], rows[1]["text"], strict=True))
    for question in questions:
        if question.image == "000001.png":
            assert asked[question.question] == question.answers[0]
    write_scenes(tmp_path, 5, split="validation")
    assert not (tmp_path / "questions.jsonl").exists() and "prompt" not in (tmp_path / "metadata.jsonl").read_text()
