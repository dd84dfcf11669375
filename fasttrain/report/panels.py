"""What is drawn of a run: panels of metrics over steps, one run or several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fasttrain.pages import plot_png
from fasttrain.report.runs import Run

# Wong (2011), told apart by colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_STYLES = ("-", "--", ":", "-.")
_SMOOTH_FROM = 80  # steps; fewer are drawn as they are


@dataclass(frozen=True, kw_only=True)
class Panel:
    """names: metrics drawn together, with the words for them. scale: what values are multiplied by. caption: how to read it.

    of_pairs: what the caption adds where pairs were trained on.
    """

    name: str
    title: str
    names: dict[str, str]
    scale: float = 1.0
    caption: str = ""
    of_pairs: str = ""

    def caption_for(self, runs: Sequence[Run]) -> str:
        added = self.of_pairs if any(run.unit == "pairs" for run in runs) else ""
        return f"{self.caption} {added}".strip()


PANELS = (
    Panel(
        name="loss",
        title="loss",
        names={"loss": "training", "eval_loss": "evaluation"},
        caption="What training lowers.",
        of_pairs="DPO's own loss, sigmoid, starts at 0.693 (ln 2: it cannot tell the answers apart yet).",
    ),
    Panel(
        name="rewards",
        title="rewards: beta x (policy - reference), nats",
        names={"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"},
        caption="How much more likely than at the start the model finds each answer. The margin between them should grow; "
        "that both fall is common.",
    ),
    Panel(
        name="accuracy",
        title="share of pairs with chosen above rejected",
        names={"rewards/accuracies": "training", "eval_rewards/accuracies": "evaluation"},
        caption="0.5 is chance; at the first step nothing has moved, so no pair counts.",
    ),
    Panel(
        name="margins",
        title="reward margin",
        names={"rewards/margins": "training", "eval_rewards/margins": "evaluation"},
        caption="Chosen minus rejected reward; evaluation far below training means learning by heart.",
    ),
    Panel(
        name="logps",
        title="log-probability of an answer, nats",
        names={"logps/chosen": "chosen", "logps/rejected": "rejected"},
        caption="Of whole answers, so that long ones lie lower.",
    ),
    Panel(
        name="logits",
        title="logit, mean over vocabulary and answer tokens",
        names={"logits/chosen": "chosen", "logits/rejected": "rejected"},
        caption="All logits moved alike change no answer: the two curves should stay near each other.",
    ),
    Panel(
        name="token_accuracy",
        title="share of tokens that are the most likely one",
        names={"mean_token_accuracy": "training", "eval_mean_token_accuracy": "evaluation"},
        caption="How often the model would have written the very next token of the answer.",
    ),
    Panel(
        name="entropy",
        title="entropy, nats",
        names={"entropy": "training", "eval_entropy": "evaluation"},
        caption="How undecided the model is about the next token; 0 is certain.",
    ),
    Panel(
        name="lengths",
        title="length of an answer, tokens",
        names={"lengths/chosen": "chosen", "lengths/rejected": "rejected"},
        of_pairs="Where chosen answers are longer throughout, training may teach length instead of quality.",
    ),
    Panel(
        name="grad_norm",
        title="gradient norm before clipping",
        names={"grad_norm": ""},
        caption="Spikes that do not come down again announce divergence.",
    ),
    Panel(
        name="learning_rate",
        title="learning rate",
        names={"learning_rate": ""},
        caption="As scheduled; 0 at the first step under warm-up.",
    ),
    Panel(name="step_s", title="seconds a step", names={"step_s": ""}),
    Panel(name="tokens_per_s", title="tokens a second", names={"tokens_per_s": ""}),
    Panel(
        name="tokens",
        title="tokens a step: run, and without sharing and cache",
        names={"tokens": "run", "tokens_unshared": "without"},
        caption="Work done, and what a trainer does that repeats prompt and image for every answer.",
        of_pairs="For pairs it runs a reference besides.",
    ),
    Panel(
        name="mfu",
        title="model FLOPs utilisation, %",
        names={"mfu": ""},
        scale=100,
        caption="Share of the machine's peak arithmetic that went into the model; what peak, the summary says.",
    ),
    Panel(
        name="memory",
        title="peak memory, GB",
        names={"peak_bytes": ""},
        scale=1e-9,
        caption="Most that was held so far: by tensors on a GPU, by the whole process on a CPU.",
    ),
)
# Not over the steps; the parts of a step have a section of their own.
_NOT_DRAWN = frozenset(
    {"step", "epoch", "pairs", "examples", "pairs_per_s", "examples_per_s", "tflops", "data_s", "forward_s", "backward_s",
     "update_s", "tokens_images", "tokens_prompts", "tokens_answers"}
)  # fmt: skip


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """Panels with something to draw; metrics that no panel knows, as a benchmark's score, get their own."""
    there = {name: None for run in runs for line in run.metrics for name in line}
    known = {name for panel in PANELS for name in panel.names} | _NOT_DRAWN
    extra = [
        Panel(name=f"metric_{number}", title=name, names={name: ""})
        for number, name in enumerate(
            name for name in there if name not in known and not name.startswith("eval_")
        )
    ]
    extra += [
        Panel(name=f"eval_{number}", title=name, names={name: ""})
        for number, name in enumerate(
            name for name in there if name.startswith("eval_") and name not in known and name[5:] not in known
        )
    ]
    margins_alone = len(runs) > 1 or bool(runs[0].series("eval_rewards/margins")[0])
    drawn = [panel for panel in (*PANELS, *extra) if panel.name != "margins" or margins_alone]
    return [panel for panel in drawn if any(run.series(name)[0] for run in runs for name in panel.names)]


def is_panel(name: str) -> bool:
    """Whether a report may draw a panel of this name."""
    return any(panel.name == name for panel in PANELS) or re.fullmatch(r"(metric|eval)_\d+", name) is not None


def panel_png(panel: Panel, runs: Sequence[Run]) -> bytes:
    """One panel; a colour per run, or per metric when there is one run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.6, 3.1), layout="constrained")
    axis = figure.subplots()
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    several = len(runs) > 1
    in_words = sum(any(run.series(name)[0] for run in runs) for name in panel.names) > 1
    for index, run in enumerate(runs):
        for place, (name, word) in enumerate(panel.names.items()):
            steps, values = run.series(name)
            if not steps:
                continue
            colour = COLOURS[(index if several else place) % len(COLOURS)]
            words = (shown(run.name) if several else "", word if in_words else "")
            label = " ".join(part for part in words if part)
            style = _STYLES[place % len(_STYLES)] if several else "-"
            _draw(axis, np.array(steps), panel.scale * np.array(values), colour, style, label)
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    axis.grid(alpha=0.3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    labels = len(axis.get_legend_handles_labels()[1])
    if labels > 4:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    elif labels:
        axis.legend(fontsize=8, frameon=False)
    return plot_png(figure, dpi=100)


def _draw(axis: Any, steps: np.ndarray, values: np.ndarray, colour: str, style: str, label: str) -> None:
    """A line; over a long run the values are faint and their running mean stands out."""
    marker = "o" if len(steps) < 20 else ""
    size = 3 if len(steps) > 1 else 6
    if len(steps) < _SMOOTH_FROM:
        axis.plot(steps, values, style, color=colour, marker=marker, markersize=size, label=label or None)
        return
    axis.plot(steps, values, "-", color=colour, alpha=0.25, linewidth=0.8)
    width = max(3, len(steps) // 40)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    axis.plot(steps, (sums[ends] - sums[starts]) / (ends - starts), style, color=colour, label=label or None)


def shown(name: str) -> str:
    """A run's name in a plot: not too long; matplotlib reads a pair of dollars as mathematics, a leading underscore as no label."""
    short = name if len(name) <= 30 else f"{name[:14]}…{name[-14:]}"
    return short.replace("$", r"\$").lstrip("_") or "run"
