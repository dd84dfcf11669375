"""A small study on drawn charts: all four arms, three data sizes, three shares of label noise, in minutes on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fasttrain.errors import UserError, mistakes_of_data_tools
from fasttrain.files import write_atomic

MARK = "# Written by `fasttrain study --demo`."
RECIPE = """\
{mark} What all runs share.
lora:
  rank: 16
  alpha: 32
data:
  workers: 0                    # images this small are read faster than they are sent between processes
loss: {{}}
train:
  epochs: 1
  pairs_per_step: 16
  warmup_ratio: 0.05
  checkpoint_every: null
  seed: {seed}
reference:
  cache: {cache}
track: []
"""
STUDY = """\
{mark} A study is a grid of runs over one set of graded answers.
output: results
recipe: recipe.yaml
models:
  spoiled: model                # the demo's, with the words of SteerLM's request
answers:
  spoiled: {{annotations: data/annotations.jsonl, questions: data/questions.jsonl}}
pair: {{rejected: all}}
settings:
  dpo: {{loss.beta: 2.0, train.learning_rate: 3.0e-4}}
  sft: {{train.learning_rate: 2.4e-3}}           # the paper's other arms learn 8 times as fast as its DPO
  rejection: {{train.learning_rate: 2.4e-3}}
  steerlm: {{train.learning_rate: 2.4e-3, train.epochs: 3}}   # the words of its request are new to this model
runs:
  - method: [dpo, sft, rejection, steerlm]
  - {{method: dpo, pairs: [{quarter}, {half}]}}
  - {{method: dpo, flip: [0.25, 0.5]}}
evaluate:
  charts:
    questions: held_out/questions.jsonl
    max_new_tokens: 40
    steer: 4,4,4,0,1            # of SteerLM: here the judge marks running on as verbosity 4, a right answer as 1
"""


def write_demo_study(
    folder: Path,
    *,
    prompts: int = 640,
    questions: int = 400,
    seed: int = 11,
    echo: Callable[[str], object] = print,
) -> Path:
    """Charts, the demo model's graded answers about them, recipe and study file; what is there already is kept.

    The pairs that a quarter and a half of the prompts give are the smaller data sizes.
    """
    import json

    from fasttrain.demo.chart_files import write_questions
    from fasttrain.demo.more_words import with_request_words
    from fasttrain.demo.preference_data import make_preference_data
    from fasttrain.demo.run import MODEL
    from fasttrain.threads import one_thread

    study = folder / "study.yaml"
    if study.exists() and study.read_text(encoding="utf-8", errors="replace").startswith(MARK):
        return study
    others = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if others and not (folder / "held_out").is_dir():  # stopped while it was made, else
        raise UserError(
            f"{folder}: wanted a new folder or an earlier demo study's, got one with other contents"
        )
    with one_thread(), mistakes_of_data_tools():
        held_out = write_questions(folder / "held_out", questions, seed, "held_out")
        data = make_preference_data(folder / "data", MODEL, held_out, prompts=prompts, seed=seed, echo=echo)
    recipe = RECIPE.format(mark=MARK, seed=seed, cache=json.dumps(str(folder.resolve() / "reference")))
    write_atomic(folder / "recipe.yaml", recipe)
    with_request_words(MODEL, folder / "model")
    write_atomic(
        study,
        STUDY.format(mark=MARK, quarter=max(1, data.pairs // 4), half=max(1, data.pairs // 2)),
    )
    return study
