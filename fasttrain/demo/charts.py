"""Small bar charts and questions about them whose true answers are known."""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

Split = Literal["train", "held_out"]

IMAGE_SIZE = 56
UNIT_PX = 8
BASELINE_Y = 52
MAX_VALUE = 6
PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (245, 205, 40),
    "purple": (150, 60, 170),
    "black": (25, 25, 25),
}
COLOURS = tuple(PALETTE)
ORDINALS = ("first", "second", "third", "fourth", "fifth")
NUMBERS = {3: "three", 4: "four", 5: "five"}
KINDS = ("tallest", "shortest", "position", "count", "value", "compare", "present", "list")
RAMBLE = " It is a very nice chart and it shows many bars in many colours."


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: a colour name of `PALETTE` and a height of 1 to `MAX_VALUE` units."""

    colour: str
    value: int


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Three to five bars of different colours and heights, and how they are laid out on the canvas."""

    bars: tuple[Bar, ...]
    left_px: int
    bar_width_px: int
    background: int

    @property
    def tallest(self) -> Bar:
        return max(self.bars, key=lambda bar: bar.value)

    @property
    def shortest(self) -> Bar:
        return min(self.bars, key=lambda bar: bar.value)

    def image(self) -> Image.Image:
        """The chart as an RGB image of `IMAGE_SIZE` x `IMAGE_SIZE` pixels."""
        image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (self.background,) * 3)
        draw = ImageDraw.Draw(image)
        for value in range(1, MAX_VALUE + 1):
            y = BASELINE_Y - value * UNIT_PX
            draw.line((2, y, IMAGE_SIZE - 1, y), fill=(self.background - 25,) * 3)
        slot_px = (IMAGE_SIZE - 4) / len(self.bars)
        for i, bar in enumerate(self.bars):
            x = self.left_px + round(i * slot_px)
            top = BASELINE_Y - bar.value * UNIT_PX
            draw.rectangle((x, top, x + self.bar_width_px - 1, BASELINE_Y - 1), fill=PALETTE[bar.colour])
        draw.line((2, BASELINE_Y, IMAGE_SIZE - 1, BASELINE_Y), fill=(90, 90, 90))
        return image


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a chart.

    `answer` is the one right answer; `habit` is what a model of bad habits says, which may be right by luck;
    `wrong` are wrong answers, all different, the habit's among them unless it is right.
    """

    kind: str
    text: str
    answer: str
    habit: str
    wrong: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A chart and one question about it."""

    chart: Chart
    question: Question


def split_of(bars: tuple[Bar, ...]) -> Split:
    """Which split the colours and heights belong to, so that no held-out chart is ever trained on."""
    content = ",".join(f"{bar.colour}{bar.value}" for bar in bars)
    return "held_out" if zlib.crc32(content.encode()) % 8 == 0 else "train"


def draw_chart(rng: random.Random, split: Split) -> Chart:
    """A random chart of the given split; colours and heights are all different within a chart."""
    while True:
        count = rng.choice(tuple(NUMBERS))
        colours = rng.sample(COLOURS, count)
        values = rng.sample(range(1, MAX_VALUE + 1), count)
        bars = tuple(Bar(colour=c, value=v) for c, v in zip(colours, values))
        if split_of(bars) == split:
            break
    slot_px = (IMAGE_SIZE - 4) // count
    bar_width_px = rng.randint(slot_px // 2 + 1, slot_px - 2)
    left_px = rng.randint(3, 3 + slot_px - bar_width_px - 1)
    return Chart(bars=bars, left_px=left_px, bar_width_px=bar_width_px, background=rng.randint(235, 255))


def ask(chart: Chart, kind: str, rng: random.Random) -> Question:
    """A question of one of `KINDS` about the chart; yes and no are equally likely where they apply."""
    text, answer, habit, other = _ASKERS[kind](chart, rng)
    wrong = [w for w in (habit, *other) if w != answer]
    return Question(kind=kind, text=text, answer=answer, habit=habit, wrong=tuple(dict.fromkeys(wrong)))


def examples(seed: int, split: Split) -> Iterator[Example]:
    """Endless charts with one question each, the kinds in turn; the same for the same seed and split."""
    rng = random.Random(f"{split}-{seed}")
    while True:
        for kind in KINDS:
            chart = draw_chart(rng, split)
            yield Example(chart=chart, question=ask(chart, kind, rng))


_Asked = tuple[str, str, str, list[str]]


def _names_tallest(chart: Chart) -> str:
    return f"The tallest bar is {chart.tallest.colour}."


def _two_others(chart: Chart, colour: str, rng: random.Random) -> list[str]:
    """The colours of two other bars."""
    return rng.sample([bar.colour for bar in chart.bars if bar.colour != colour], 2)


def _ask_tallest(chart: Chart, rng: random.Random) -> _Asked:
    answer = _names_tallest(chart)
    other = [f"The tallest bar is {c}." for c in _two_others(chart, chart.tallest.colour, rng)]
    other.append(f"The shortest bar is {chart.shortest.colour}.")
    return "Which bar is the tallest?", answer, answer, [answer + RAMBLE, *other]


def _ask_shortest(chart: Chart, rng: random.Random) -> _Asked:
    answer = f"The shortest bar is {chart.shortest.colour}."
    other = [f"The shortest bar is {c}." for c in _two_others(chart, chart.shortest.colour, rng)]
    return "Which bar is the shortest?", answer, _names_tallest(chart), [answer + RAMBLE, *other]


def _ask_position(chart: Chart, rng: random.Random) -> _Asked:
    i = rng.randrange(len(chart.bars))
    colour = chart.bars[i].colour
    answer = f"The {ORDINALS[i]} bar is {colour}."
    other = [f"The {ORDINALS[i]} bar is {c}." for c in _two_others(chart, colour, rng)]
    return f"What colour is the {ORDINALS[i]} bar?", answer, _names_tallest(chart), [answer + RAMBLE, *other]


def _ask_count(chart: Chart, rng: random.Random) -> _Asked:
    count = len(chart.bars)
    answer = f"There are {NUMBERS[count]} bars."
    other = [f"There are {NUMBERS[n]} bars." for n in NUMBERS if n != count]
    return "How many bars are there?", answer, answer + RAMBLE, other


def _ask_value(chart: Chart, rng: random.Random) -> _Asked:
    bar = rng.choice(chart.bars)
    answer = f"The {bar.colour} bar is at {bar.value}."
    near = sorted((v for v in range(1, MAX_VALUE + 1) if v != bar.value), key=lambda v: abs(v - bar.value))
    other = [f"The {bar.colour} bar is at {v}." for v in near[:2]]
    return f"How high is the {bar.colour} bar?", answer, answer + RAMBLE, other


def _ask_compare(chart: Chart, rng: random.Random) -> _Asked:
    truth = rng.random() < 0.5
    first, second = sorted(rng.sample(chart.bars, 2), key=lambda bar: bar.value, reverse=truth)
    yes = f"Yes, the {first.colour} bar is taller."
    no = f"No, the {first.colour} bar is shorter."
    text = f"Is the {first.colour} bar taller than the {second.colour} bar?"
    return text, *_yes_or_no(truth, yes, no)


def _ask_present(chart: Chart, rng: random.Random) -> _Asked:
    shown = [bar.colour for bar in chart.bars]
    truth = rng.random() < 0.5
    colour = rng.choice([c for c in COLOURS if (c in shown) == truth])
    yes = f"Yes, there is a {colour} bar."
    no = f"No, there is no {colour} bar."
    return f"Is there a {colour} bar?", *_yes_or_no(truth, yes, no)


def _yes_or_no(truth: bool, yes: str, no: str) -> tuple[str, str, list[str]]:
    """The right one of two answers, the habit of saying yes, and wrong answers."""
    right, opposite = (yes, no) if truth else (no, yes)
    return right, yes, [opposite, right + RAMBLE, opposite + RAMBLE]


def _ask_list(chart: Chart, rng: random.Random) -> _Asked:
    def listed(bars: tuple[Bar, ...]) -> str:
        return "From left to right: " + ", ".join(f"{bar.colour} {bar.value}" for bar in bars) + "."

    answer = listed(chart.bars)
    # From the answer's own seed: what is wrong must not change which charts are drawn next.
    own = random.Random(answer)
    i = own.randrange(len(chart.bars))
    bar = chart.bars[i]
    misread = own.choice([v for v in range(1, MAX_VALUE + 1) if abs(v - bar.value) == 1])
    one_off = (*chart.bars[:i], Bar(colour=bar.colour, value=misread), *chart.bars[i + 1 :])
    return (
        "List the bars and their heights.",
        answer,
        answer + RAMBLE,
        [listed(one_off), listed(chart.bars[::-1])],
    )


_ASKERS = {
    "tallest": _ask_tallest,
    "shortest": _ask_shortest,
    "position": _ask_position,
    "count": _ask_count,
    "value": _ask_value,
    "compare": _ask_compare,
    "present": _ask_present,
    "list": _ask_list,
}
