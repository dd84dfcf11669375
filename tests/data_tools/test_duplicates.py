"""Questions that were asked before about the same images, word for word or nearly."""

import random

import pytest

from fasttrain_data.questions.duplicates import Duplicates
from fasttrain_data.questions.readers import Draft
from fasttrain_data.questions.text import normal_form, similarity, trigrams


def test_near_duplicates_are_found_on_one_image_and_a_changed_word_is_not_one():
    def close(one, other):
        return similarity(trigrams(normal_form(one)), trigrams(normal_form(other)))

    assert normal_form("What is the colour of a Car?") == normal_form("what is colour of car")
    assert (
        close(
            "What does the blue line in the upper left panel show?",
            "What does the red line in the upper left panel show?",
        )
        < 0.8
    )
    assert (
        close(
            "So, what does the blue line in the upper left panel of it show?",
            "What does the blue line in the upper left panel of it show?",
        )
        >= 0.8
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3 + 4?", "What is 3 - 4?"),
        ("What is 3*4?", "What is 3/4?"),
        ("Is bar A > bar B?", "Is bar A < bar B?"),
        ("Does it cost $5?", "Does it cost €5?"),
        ("Is it written in C++?", "Is it written in C#?"),
        ("What does 😀 mean?", "What does 🎉 mean?"),
        ("किताब?", "कताब?"),  # a vowel sign is no letter to Unicode
        ("ข้าว?", "ขาว?"),  # nor is a tone mark
    ],
)
def test_signs_and_marks_that_change_a_question_do_not_make_it_a_duplicate(one, other):
    assert normal_form(one) != normal_form(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What's the x-axis?", "what’s the X axis"),
        ("What does **this** mean?", "What does this mean?"),
        ("Is it ❤️?", "is it ❤"),
        ("caf\u00e9", "cafe\u0301"),
        ("می\u200cخواهم", "میخواهم"),
        ("What is 3 - 4?", "what is 3-4"),
    ],
)
def test_how_a_question_is_typeset_does_not_tell_it_apart(one, other):
    assert normal_form(one) == normal_form(other)


@pytest.mark.parametrize("near", [0.1, 0.3, 0.7, 0.8, 0.99, 1.0])
def test_duplicates_are_those_that_comparing_with_every_earlier_question_finds(near):
    rng = random.Random(5)
    words = [f"w{n}" for n in range(7)]
    starts = [[rng.choice(words) for _ in range(rng.randint(1, 14))] for _ in range(6)]
    earlier, found = {}, Duplicates(near)
    verdicts = []
    for _ in range(600):
        text = list(rng.choice(starts))
        for _ in range(rng.randint(0, 3)):
            text.insert(rng.randint(0, len(text)), rng.choice(words))
        image, question = f"{rng.randrange(40)}.png", " ".join(text)
        grams = trigrams(normal_form(question))
        asked = earlier.setdefault(image, {})
        closest = max((similarity(grams, other) for other in asked.values()), default=0)
        wanted = "near duplicate" if near < 1 and closest >= near else None
        wanted = "duplicate" if question in asked else wanted
        if wanted is None:
            asked[question] = grams
        assert found.verdict(Draft("plain", "line 1", question, [image]), [None]) == wanted
        verdicts.append(wanted)
    assert set(verdicts) == {None, "duplicate", *(["near duplicate"] if near < 0.9 else [])}


def test_questions_from_one_template_are_not_compared_each_with_each(monkeypatch):
    """5,000 about one image took three minutes."""
    compared = []
    monkeypatch.setattr(
        "fasttrain_data.questions.duplicates.similarity",
        lambda *sets: compared.append(sets) or similarity(*sets),
    )
    found = Duplicates(0.8)
    for n in range(400):
        question = f"What is the value of bar {n} of group {n * 7} in the chart for year {n * 3} shown above?"
        draft = Draft("plain", "line 1", question, [f"{n % 3}.png"])
        assert found.verdict(draft, [None]) is None
    assert len(compared) < 400


def test_questions_in_few_words_are_not_compared_each_with_each(monkeypatch):
    """As CLEVR's, whose rarest trigrams stand in many of them: 8,000 about one image took three minutes."""
    compared = []
    monkeypatch.setattr(
        "fasttrain_data.questions.duplicates.similarity",
        lambda *sets: compared.append(sets) or similarity(*sets),
    )
    rng = random.Random(7)
    sides = [("small", "large"), ("gray", "red", "blue", "green"), ("rubber", "metal"), ("cube", "sphere")]
    found = Duplicates(0.8)
    for _ in range(600):
        one, other, third = (" ".join(map(rng.choice, sides)) for _ in range(3))
        question = f"What is left of the {one} that is behind the {other} and in front of the {third}?"
        found.verdict(Draft("plain", "line 1", question, ["a.png"]), [None])
    assert len(compared) < 20 * 600
