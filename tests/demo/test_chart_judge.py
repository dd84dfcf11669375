"""The judge's grades and the margins that follow from them."""

import io
import itertools

import pytest

from fasttrain.demo.chart_judge import ChartJudge, grade
from fasttrain.demo.charts import RAMBLE, Example, examples
from fasttrain_data.records import ATTRIBUTES, Scored

TRUTH = "There are four bars."


def take(count: int) -> list[Example]:
    return list(itertools.islice(examples(5, "train"), count))


def png(example: Example) -> bytes:
    buffer = io.BytesIO()
    example.chart.image().save(buffer, "PNG")
    return buffer.getvalue()


def points(answer: str) -> int:
    """Helpfulness + correctness + coherence, the paper's score."""
    grades = grade(TRUTH, answer)
    return grades["helpfulness"] + grades["correctness"] + grades["coherence"]


def test_the_true_answer_alone_is_best_and_every_fault_costs_a_margin_of_two() -> None:
    ranked = [
        TRUTH,
        TRUTH + RAMBLE,
        "There are five bars.",
        "There are five bars." + RAMBLE,
    ]
    assert [points(answer) for answer in ranked] == [12, 8, 4, 2]


@pytest.mark.parametrize(
    "answer", ["", "There are four", "There are four bars", "four", "The tallest bar is red. " + TRUTH]
)
def test_a_broken_or_buried_answer_is_not_the_right_one(answer: str) -> None:
    assert grade(TRUTH, answer)["correctness"] == 0


def test_an_answer_that_breaks_off_while_it_runs_on_is_worth_less_than_a_finished_one() -> None:
    assert points(TRUTH + " It is a very") < points(TRUTH + RAMBLE) < points(TRUTH)


@pytest.mark.parametrize(
    "answer", [TRUTH, TRUTH + RAMBLE, "There are five bars.", "", "There are four bars. It"]
)
def test_grades_are_what_an_annotation_holds(answer: str) -> None:
    grades = grade(TRUTH, answer)
    assert set(grades) == {*ATTRIBUTES, "reason"}
    assert Scored(text=answer, **grades).scores() is not None


def test_the_truth_is_found_by_image_and_question_together() -> None:
    shown = take(64)
    judge = ChartJudge(shown)
    for example in shown:
        question = example.question
        best, *others = judge(question.text, [png(example)], [question.answer, *question.wrong])
        assert best["correctness"] == 4
        assert all(other["helpfulness"] + other["correctness"] + other["coherence"] <= 10 for other in others)
    counts = [example for example in shown if example.question.kind == "count"]
    other = next(e for e in counts if e.question.answer != counts[0].question.answer)
    assert judge(other.question.text, [png(other)], [counts[0].question.answer])[0]["correctness"] == 0


def test_a_chart_it_does_not_know_is_refused() -> None:
    shown = take(9)
    with pytest.raises(KeyError):
        ChartJudge(shown[:8])(shown[8].question.text, [png(shown[8])], ["The tallest bar is red."])
