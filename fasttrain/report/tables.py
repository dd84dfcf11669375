"""The tables of a report: what a run reached, what it did with its data, where it ran, how its recipe differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fasttrain.pages import Table
from fasttrain.report.runs import Run

Shown = tuple[str, Callable[[Run], str]]


def summary(runs: Sequence[Run]) -> Table:
    """Last values and totals, a column per run."""
    lines: list[Shown] = [
        ("method", lambda run: str(run.environment.get("method", "dpo"))),
        ("steps", lambda run: f"{run.metrics[-1]['step']:,}"),
        ("loss, last step", lambda run: _number(run.last("loss"), ".4f")),
        ("reward margin, last step", lambda run: _number(run.last("rewards/margins"), ".3f")),
        ("pairs with chosen above rejected, last step", lambda run: _share(run.last("rewards/accuracies"))),
        ("mean length of chosen answers, tokens", lambda run: _mean_length(run, "lengths/chosen")),
        ("mean length of rejected answers, tokens", lambda run: _mean_length(run, "lengths/rejected")),
        ("token accuracy, last step", lambda run: _share(run.last("mean_token_accuracy"))),
        ("evaluation loss, last", lambda run: _number(run.last("eval_loss"), ".4f")),
        ("evaluation margin, last", lambda run: _number(run.last("eval_rewards/margins"), ".3f")),
        ("evaluation pairs ordered right, last", lambda run: _share(run.last("eval_rewards/accuracies"))),
        ("pairs or examples, logged steps", lambda run: f"{run.total(run.unit):,.0f}"),
        ("seconds, logged steps", lambda run: _number(run.total("step_s"), ",.1f")),
        ("pairs or examples a second", lambda run: _rate(run, run.unit)),
        ("tokens a second", lambda run: _rate(run, "tokens")),
        ("token passes", lambda run: _number(run.total("tokens") or None, ",.0f")),
        (
            "token passes of a trainer without sharing and cache",
            lambda run: _number(run.total("tokens_unshared") or None, ",.0f"),
        ),
        ("times fewer token passes", _saved),
        ("model FLOPs utilisation, mean", _utilisation),
        ("peak memory, GB", lambda run: _number(_scaled(run.last("peak_bytes"), 1e-9), ",.2f")),
    ]
    rows = [(title, *(show(run) for run in runs)) for title, show in lines]
    sources = {str(source) for run in runs if (source := run.environment.get("mfu_peak_source"))}
    note = "; ".join(sorted(f"Model FLOPs utilisation (MFU) is against {source}" for source in sources))
    return Table(
        title="Summary",
        head=("", *(run.name for run in runs)),
        rows=tuple(row for row in rows if any(cell != "-" for cell in row[1:])),
        note=note,
    )


def data_account(runs: Sequence[Run]) -> Table:
    """Rows read, pairs, groups of one prompt, images, and what was left out, by reason."""
    rows: list[tuple[str, ...]] = []
    for part in ("train", "eval"):
        for name in ("rows", "pairs", "groups", "images", "truncated"):
            cells = [run.environment.get("data", {}).get(part, {}).get(name) for run in runs]
            if any(cell is not None for cell in cells):
                rows.append((f"{part}: {name}", *("-" if cell is None else f"{cell:,}" for cell in cells)))
    rows.append(("left out", *(f"{run.skipped.total():,}" for run in runs)))
    reasons = dict.fromkeys(reason for run in runs for reason, _ in run.skipped.most_common(10))
    rows += [
        (f"left out: {_cut(reason)}", *(f"{run.skipped[reason]:,}" for run in runs)) for reason in reasons
    ]
    return Table(title="Data", head=("", *(run.name for run in runs)), rows=tuple(rows))


def differences(runs: Sequence[Run]) -> Table:
    """Recipe keys whose values differ between the runs."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [
        (key, *(_cut(str(run.config.get(key, "-"))) for run in runs))
        for key in keys
        if len({repr(run.config.get(key)) for run in runs}) > 1 and key != "train.output"
    ]
    return Table(
        title="Where the recipes differ", head=("setting", *(run.name for run in runs)), rows=tuple(rows)
    )


def environments(runs: Sequence[Run]) -> Table:
    """Machine, versions and what was picked; several runs side by side."""
    flat = [_flat_environment(run.environment) for run in runs]
    keys = dict.fromkeys(key for facts in flat for key in facts)
    rows = [(key, *(facts.get(key, "-") for facts in flat)) for key in keys]
    return Table(
        title="Environment", head=("", *(run.name for run in runs)), rows=tuple(rows), words=1 + len(runs)
    )


def _flat_environment(facts: dict[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in facts.items():
        if key == "versions" and isinstance(value, dict):
            flat |= {f"version of {name}": str(version) for name, version in value.items() if version}
        elif key == "command" and isinstance(value, list):
            flat[key] = _cut(" ".join(map(str, value)))
        elif isinstance(value, list):
            flat[key] = ", ".join(map(str, value)) or "none"
        elif not isinstance(value, dict) and value is not None:
            flat[key] = _cut(f"{value:,.6g}" if isinstance(value, float) else str(value))
    return flat


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    text = format(value, form)
    return text.lstrip("-") if not text.strip("-0.,") else text  # no minus before zeros


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else scale * value


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _rate(run: Run, name: str) -> str:
    seconds = run.total("step_s")
    return f"{run.total(name) / seconds:,.1f}" if seconds and run.series(name)[0] else "-"


def _mean_length(run: Run, name: str) -> str:
    """Over the pairs or examples of the logged steps."""
    values, counts = run.series(name)[1], run.series(run.unit)[1]
    if not values or len(values) != len(counts) or not sum(counts):
        return "-"
    return f"{sum(v * c for v, c in zip(values, counts, strict=True)) / sum(counts):,.1f}"


def _saved(run: Run) -> str:
    done, otherwise = run.total("tokens"), run.total("tokens_unshared")
    return f"{otherwise / done:.1f}" if done and otherwise else "-"


def _utilisation(run: Run) -> str:
    values, seconds = run.series("mfu")[1], run.series("step_s")[1]
    if not values or len(values) != len(seconds) or not sum(seconds):
        return "-"
    return f"{100 * sum(v * s for v, s in zip(values, seconds, strict=True)) / sum(seconds):.1f} %"


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 100 else flat[:97] + "..."
