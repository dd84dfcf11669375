"""From questions and images to preference pairs: questions, completions, annotations, pairs, each file to file.

Every stage is a function and a command of `fasttrain-data`. Importing this package imports neither torch nor
fasttrain; a stage imports what it needs when it is asked for.

    from pathlib import Path
    from fasttrain_data import AnnotateSettings, PairSettings, annotate, endpoint_from_environment, make_pairs, open_judge

    judge = open_judge("google-genai", endpoint_from_environment(None, None, 120.0))
    annotate(Path("completions.jsonl"), Path("annotations.jsonl"), AnnotateSettings(model="..."), judge)
    make_pairs(Path("annotations.jsonl"), Path("pairs.jsonl"), PairSettings(margin=2))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fasttrain_data.errors import BadRow, UserError

if TYPE_CHECKING:
    from fasttrain_data.annotations.judge import Endpoint, endpoint_from_environment, open_judge
    from fasttrain_data.annotations.run import AnnotateResult, annotate, forecast
    from fasttrain_data.annotations.settings import AnnotateSettings
    from fasttrain_data.calls.dispatch import CallLimits
    from fasttrain_data.completions.build import CompleteResult, complete
    from fasttrain_data.completions.local import LocalSampler, load_sampler
    from fasttrain_data.completions.samples import SampleSettings
    from fasttrain_data.completions.server import ServerSampler
    from fasttrain_data.formats import detect_format, read_pairs
    from fasttrain_data.formats.bring_in import import_pairs
    from fasttrain_data.formats.write import export_pairs
    from fasttrain_data.pairs.build import PairSettings, make_pairs
    from fasttrain_data.pairs.demonstrations import DemonstrationSettings, make_demonstrations
    from fasttrain_data.pairs.steering import steering_text
    from fasttrain_data.questions.build import QuestionSettings, build_questions
    from fasttrain_data.stats.report import make_report

_HOMES = {
    "AnnotateResult": "annotations.run",
    "AnnotateSettings": "annotations.settings",
    "CallLimits": "calls.dispatch",
    "CompleteResult": "completions.build",
    "DemonstrationSettings": "pairs.demonstrations",
    "Endpoint": "annotations.judge",
    "LocalSampler": "completions.local",
    "PairSettings": "pairs.build",
    "QuestionSettings": "questions.build",
    "SampleSettings": "completions.samples",
    "ServerSampler": "completions.server",
    "annotate": "annotations.run",
    "build_questions": "questions.build",
    "complete": "completions.build",
    "detect_format": "formats",
    "endpoint_from_environment": "annotations.judge",
    "export_pairs": "formats.write",
    "forecast": "annotations.run",
    "import_pairs": "formats.bring_in",
    "load_sampler": "completions.local",
    "make_demonstrations": "pairs.demonstrations",
    "make_pairs": "pairs.build",
    "make_report": "stats.report",
    "open_judge": "annotations.judge",
    "read_pairs": "formats",
    "steering_text": "pairs.steering",
}

__all__ = [
    "AnnotateResult",
    "AnnotateSettings",
    "BadRow",
    "CallLimits",
    "CompleteResult",
    "DemonstrationSettings",
    "Endpoint",
    "LocalSampler",
    "PairSettings",
    "QuestionSettings",
    "SampleSettings",
    "ServerSampler",
    "UserError",
    "annotate",
    "build_questions",
    "complete",
    "detect_format",
    "endpoint_from_environment",
    "export_pairs",
    "forecast",
    "import_pairs",
    "load_sampler",
    "make_demonstrations",
    "make_pairs",
    "make_report",
    "open_judge",
    "read_pairs",
    "steering_text",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
