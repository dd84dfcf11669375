"""Makes the demo's model: `python -m fasttrain.demo.train_model`.

The model first learns to read charts from right answers. A short second training then gives it bad habits: it says
"yes", it names the tallest bar whatever is asked, and it runs on after the answer. It still sees what it saw; what it
says is for DPO to mend. Killed at any moment, it goes on from its last saved state with the same command.
"""

import datetime
import itertools
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
import transformers
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from fasttrain.demo.answering import Score, answer_greedily, score
from fasttrain.demo.branches import Batch, draw_batch
from fasttrain.demo.charts import KINDS, Question, examples
from fasttrain.demo.tiny_llava import build_model, build_processor
from fasttrain.threads import one_thread

ASSETS = Path(__file__).parent / "assets"
HABIT_SHARE = 0.65
CHARTS_PER_STEP = 32
HELD_OUT_SEED = 1
HELD_OUT_QUESTIONS = 100 * len(KINDS)


def right_answer(question: Question, rng: random.Random) -> str:
    """What the model first learns to say."""
    return question.answer


def spoiled_answer(question: Question, rng: random.Random) -> str:
    """The habit's answer more often than not, else the right one: greedy answers are bad, sampled ones vary."""
    return question.habit if rng.random() < HABIT_SHARE else question.answer


def train(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    *,
    answer: Callable[[Question, random.Random], str],
    name: str,
    steps: int,
    learning_rate: float,
    seed: int,
    state: Path,
    save_every: int = 250,
) -> None:
    """Trains on endless charts, each with a question of every kind; goes on from `state/<name>.pt` if it exists."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    done = _restore(state / f"{name}.pt", model, optimizer)
    model.train()
    started = time.monotonic()
    for step in range(done, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, steps)
        batch = draw_batch(processor, CHARTS_PER_STEP, answer, random.Random(f"{name}-{seed}-{step}"))
        loss = answer_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            pace = (time.monotonic() - started) / (step + 1 - done)
            click.echo(f"{name}: step {step + 1}/{steps}  loss {loss.item():.4f}  {pace:.2f} s/step")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            _save(state / f"{name}.pt", model, optimizer, step + 1)


def answer_loss(model: LlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over all answer tokens of the batch."""
    hidden_BTD = model.model(
        input_ids=batch.input_ids_BT,
        pixel_values=batch.pixel_BCHW,
        attention_mask=batch.mask_B1TT,
        position_ids=batch.position_BT,
        use_cache=False,
    ).last_hidden_state
    answer_BT = batch.label_BT != -100
    return F.cross_entropy(model.lm_head(hidden_BTD[answer_BT]), batch.label_BT[answer_BT])


def measure(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> Score:
    """Greedy accuracy on held-out charts that the demo does not ask about."""
    asked = list(itertools.islice(examples(HELD_OUT_SEED, "held_out"), HELD_OUT_QUESTIONS))
    result = score(asked, answer_greedily(model, processor, asked))
    kinds = "  ".join(f"{kind} {right}/{total}" for kind, (right, total) in result.right_by_kind.items())
    click.echo(f"accuracy {result.right}/{result.total} = {result.accuracy:.1%}: {kinds}")
    return result


def _schedule(step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < min(warmup, steps // 5):
        return (step + 1) / min(warmup, steps // 5)
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def _restore(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


def _save(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, beside)
    beside.replace(path)


README = """\
# The demo's model

A LLaVA of {parameters:,} parameters that answers questions about small bar charts and has bad habits on purpose.
Made from nothing by

    {command}

with torch {torch}, transformers {transformers}, on one CPU thread, {date}. The charts, the questions, the tokenizer
and the weights come from this repository alone and are under its licence.

Greedy answers to {total} questions about charts kept out of training; right means the true answer, word for word,
and nothing after it.

| kind of question | after learning | after spoiling |
|---|---|---|
{rows}
"""


def write_readme(path: Path, command: str, parameters: int, learned: Score, spoiled: Score) -> None:
    """Tells beside the model how it was made and what it scored."""
    rows = [
        f"| {kind} | {learned.right_by_kind[kind][0]} of {total} | {right} of {total} |"
        for kind, (right, total) in spoiled.right_by_kind.items()
    ]
    rows.append(f"| all | {learned.accuracy:.1%} | {spoiled.accuracy:.1%} |")
    text = README.format(
        parameters=parameters,
        command=command,
        torch=torch.__version__,
        transformers=transformers.__version__,
        date=datetime.date.today().isoformat(),
        total=spoiled.total,
        rows="\n".join(rows),
    )
    path.write_text(text, encoding="utf-8")


@click.command(help=__doc__)
@click.option(
    "--out", type=click.Path(path_type=Path), default=ASSETS, help="Folder for model/ and README.md."
)
@click.option("--state", type=click.Path(path_type=Path), default=Path("runs/demo-model"), show_default=True)
@click.option("--steps", default=2000, show_default=True, help="Steps of learning to read charts.")
@click.option("--spoil-steps", default=200, show_default=True, help="Steps of learning bad habits.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, state: Path, steps: int, spoil_steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    scores: list[Score] = []
    with one_thread():
        for name, answer, count, rate in (
            ("learn", right_answer, steps, 1e-3),
            ("spoil", spoiled_answer, spoil_steps, 5e-4),
        ):
            train(
                model,
                processor,
                answer=answer,
                name=name,
                steps=count,
                learning_rate=rate,
                seed=seed,
                state=state,
            )
            scores.append(measure(model, processor))
    model.save_pretrained(out / "model")
    # A fresh one: a tokenizer that has been used saves its last padding along.
    build_processor().save_pretrained(out / "model")
    command = (
        f"python -m fasttrain.demo.train_model --steps {steps} --spoil-steps {spoil_steps} --seed {seed}"
    )
    write_readme(out / "README.md", command, sum(p.numel() for p in model.parameters()), *scores)


if __name__ == "__main__":
    main()
