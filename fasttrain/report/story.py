"""A run in two sentences, for a reader who has not seen one before."""

from __future__ import annotations

from pathlib import Path

from fasttrain.report.runs import Run

_METHODS = {
    "dpo": "by Direct Preference Optimization: of two answers to the same prompt it learned to find the chosen one more likely",
    "sft": "by supervised fine-tuning: it learned to write the given answers",
}


def story(run: Run) -> str:
    """What was trained on what, and how far it got."""
    method = str(run.environment.get("method", "dpo"))
    name = str(run.config.get("model.name", ""))
    model = f"the model {name if name.count('/') == 1 else Path(name).name}" if name else "a model"
    count = run.environment.get(run.unit)
    of_what = f"{count:,} {run.unit}" if isinstance(count, int) else run.unit
    steps = run.metrics[-1]["step"]
    text = f"{run.name}: {model} was trained on {of_what} in {steps:,} {'step' if steps == 1 else 'steps'} "
    text += _METHODS.get(method, f"by {method}") + "."
    losses = run.series("loss")[1]
    if len(losses) > 1:
        text += f" The loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
        share = run.last("rewards/accuracies")
        text += (
            f"; at the end {share:.0%} of a step's pairs had the chosen answer ahead."
            if share is not None
            else "."
        )
    elif losses:
        text += f" One step is logged, with a loss of {losses[0]:.3f}: how it goes on cannot be seen yet."
    return text
