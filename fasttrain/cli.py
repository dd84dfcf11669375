"""The `fasttrain` command. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import sys
from pathlib import Path

import click

from fasttrain import __version__
from fasttrain.answering.command import answer_command
from fasttrain.command import quick_imports
from fasttrain.ending import run_to_its_end
from fasttrain.errors import UserError
from fasttrain.evaluate.command import eval_command
from fasttrain.progress import is_first
from fasttrain.study.command import study_command

RECIPE_OPTIONS = (
    click.option("-c", "--config", "recipe", required=True, metavar="RECIPE.yaml", help="The recipe."),
    click.option(
        "-s", "--set", "overrides", multiple=True, metavar="KEY=VALUE",
        help="Override a setting, for example -s train.learning_rate=1e-5. May be repeated.",
    ),
)  # fmt: skip


def _with_recipe(command):  # type: ignore[no-untyped-def]
    for option in reversed(RECIPE_OPTIONS):
        command = option(command)
    return command


def _with_training(command):  # type: ignore[no-untyped-def]
    for option in (
        click.option(
            "--dry-run", is_flag=True, help="Check recipe, data and model, print counts; train nothing."
        ),
        click.option("--overwrite", is_flag=True, help="Start anew in a run folder that is in use."),
        click.option("--resume", is_flag=True, help="Go on from the last checkpoint of the run folder."),
    ):
        command = option(command)
    return _with_recipe(command)


# What a user may have told torch about GPU memory with, its older names included.
_ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)+=")


class _Commands(click.Group):
    """Answers `loss.beta=0.2` without -s with what was meant."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [param for command in self.commands.values() for param in command.params]
        take_values = {name for o in options for name in o.opts if not getattr(o, "is_flag", False)}
        for before, word in zip(["", *args], args):
            if _OVERRIDE.match(word) and before not in take_values:
                raise click.UsageError(f"unexpected {word!r}; did you mean -s {word}?", ctx)
        return super().parse_args(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fasttrain")
def cli() -> None:
    """Direct Preference Optimization for vision-language models, fast and exact."""
    _prepare_torch()


@cli.command()
@_with_training
def dpo(recipe: str, overrides: tuple[str, ...], resume: bool, overwrite: bool, dry_run: bool) -> None:
    """Align a model on preference pairs.

    Fills the cache of reference log-probs where needed, trains, and writes the run folder: metrics.jsonl, checkpoints/, and
    the adapter in final/.

    \b
    Example:
      fasttrain dpo -c recipe.yaml -s train.output=runs/first -s lora.rank=64
    """
    _train("dpo", recipe, overrides, resume, overwrite, dry_run)


@cli.command()
@_with_training
def sft(recipe: str, overrides: tuple[str, ...], resume: bool, overwrite: bool, dry_run: bool) -> None:
    """Teach a model answers: supervised fine-tuning with the same recipe and machinery.

    Learns `completion` of each row (what `fasttrain-data pair --for sft|rejection|steerlm` writes), or `chosen` of a pair
    file. The loss is the mean cross-entropy over a step's answer tokens. No reference model is used.

    \b
    Example:
      fasttrain sft -c recipe.yaml -s data.train=rejection.jsonl -s train.learning_rate=4e-4
    """
    _train("sft", recipe, overrides, resume, overwrite, dry_run)


def _train(
    command: str, recipe: str, overrides: tuple[str, ...], resume: bool, overwrite: bool, dry_run: bool
) -> None:
    from fasttrain.config import load_config

    if resume and overwrite:
        raise UserError("--resume and --overwrite: wanted one of them, got both")
    config = load_config(recipe, overrides)
    with quick_imports(config):
        from fasttrain.train.loop import OBJECTIVES, train

    loss = OBJECTIVES[command](config.loss)
    if dry_run:
        from fasttrain.train.dry_run import dry_run as run
        from fasttrain.train.engine import join_ranks

        join_ranks(config)
        _tell(run(config, loss, resume=resume, overwrite=overwrite))
        return
    result = train(config, loss, resume=resume, overwrite=overwrite)
    if result.metrics:
        last = result.metrics[-1]
        _tell(f"{loss.summary(last)} at step {last['step']}")
    _tell(f"run folder: {result.folder}")
    if result.adapter.exists():
        _tell(f"adapter: {result.adapter}" if config.lora else f"model: {result.adapter}")


@cli.command()
@_with_recipe
def reference(recipe: str, overrides: tuple[str, ...]) -> None:
    """Fill the cache of reference log-probs, and nothing else.

    \b
    Example:
      fasttrain reference -c recipe.yaml
    """
    from fasttrain.config import load_config

    config = load_config(recipe, overrides)
    with quick_imports(config):
        from fasttrain.train.engine import join_ranks, make_engine
        from fasttrain.train.first_step import check_sharing
        from fasttrain.train.job import build_job
        from fasttrain.train.references import fill_references

    join_ranks(config)
    with contextlib.closing(build_job(config)) as job:
        if config.distributed.zero_stage == 3:  # its hooks gather the weights
            make_engine(job.policy, config, checkpointing=False)
        check_sharing(job)
        report = fill_references(job, everything=True)
    _tell(f"completions: {report.completions:,}, computed now: {report.computed:,}")
    _tell(f"cache: {job.cache.path}")


@cli.command()
@_with_recipe
@click.option(
    "--gpu", default="a100-80g", show_default=True, help="a100-40g a100-80g h100 h200 b200 l40s rtx4090"
)
@click.option("--gpus", default=1, show_default=True, metavar="N", help="How many of them.")
@click.option(
    "--lengths",
    multiple=True,
    metavar="PROMPT,COMPLETION,COUNT",
    help="Lengths in tokens, and pairs, instead of the recipe's pair file. May be repeated.",
)
@click.option(
    "--matrix-share", default=0.5, show_default=True, help="Share of the matrix rate that a run reaches."
)
@click.option(
    "--memory-share", default=0.92, show_default=True, help="Share of the memory that tensors may take."
)
@click.option(
    "--link-share",
    default=0.7,
    show_default=True,
    help="Share of the interconnect's rate that a run reaches.",
)
@click.option("--node-link", default=50.0, show_default=True, help="GB/s per GPU between nodes, past 8 GPUs.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable: bytes, tokens, operations, seconds.")
def plan(
    recipe: str, overrides: tuple[str, ...], gpu: str, gpus: int, lengths: tuple[str, ...], matrix_share: float,
    memory_share: float, link_share: float, node_link: float, as_json: bool,
) -> None:  # fmt: skip
    """Predict memory, work, communication and time of a run; needs no GPU and no weights.

    \b
    Examples:
      fasttrain plan -c recipes/llava15_13b_paper.yaml --gpu a100-80g --gpus 4
      fasttrain plan -c recipe.yaml --gpu rtx4090 --lengths 630,130,5000
    """
    from fasttrain.config import load_config

    config = load_config(recipe, overrides)
    for name, share in (("matrix", matrix_share), ("memory", memory_share), ("link", link_share)):
        if not 0 < share <= 1:
            raise UserError(f"--{name}-share: wanted a share above 0 and up to 1, got {share:g}")
    if not node_link > 0:
        raise UserError(f"--node-link: wanted GB/s above 0, got {node_link:g}")
    _prepare_torch()
    from fasttrain.plan.command import make_plan
    from fasttrain.plan.gpus import Achieved

    achieved = Achieved(matrix=matrix_share, link=link_share, memory=memory_share)
    click.echo(
        make_plan(
            config,
            gpu=gpu,
            gpus=gpus,
            lengths=lengths,
            achieved=achieved,
            node_link_gbytes=node_link,
            machine_readable=as_json,
        )
    )


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder for the merged model."
)
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run Python code that comes with an adapter folder's base model; for a run its recipe says so.",
)
def merge(run: Path, out: Path, trust_remote_code: bool) -> None:
    """Write a run's adapter and its base model as one ordinary Hugging Face model folder.

    RUN is a run folder with final/, or an adapter folder. Needs memory for one copy of the weights.

    \b
    Example:
      fasttrain merge runs/llava15-7b -o models/llava15-7b-dpo
    """
    _prepare_torch()
    from fasttrain.merge import merge as run_merge

    click.echo(f"model: {run_merge(run, out, trust_remote_code=trust_remote_code)}")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def env(as_json: bool) -> None:
    """Show versions, devices, and which backend is picked and why. Paste it into bug reports."""
    import json

    from fasttrain.environment import collect_facts

    facts = collect_facts()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if name == "versions":
            for package, version in value.items():
                click.echo(f"{package:24} {version or 'not installed'}")
        elif isinstance(value, dict):
            for part, said in value.items():
                click.echo(f"{name.replace('_', ' ') + ' ' + part:24} {said}")
        elif name != "command":
            shown = ", ".join(value) or "none" if isinstance(value, list) else value
            click.echo(f"{name.replace('_', ' '):24} {shown}")


@cli.command()
@click.argument("folders", nargs=-1, required=True, metavar="[NAME=]RUN...")
@click.option(
    "-o",
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where report.html and plots/ go. Default: the run folder; wanted with several runs.",
)
@click.option("--examples", type=click.IntRange(0), default=6, show_default=True, help="Pairs to show.")
def report(folders: tuple[str, ...], out: Path | None, examples: int) -> None:
    """Make one page about a run, or about several side by side.

    The page opens from disk and loads nothing: loss, margins, accuracies, log-probs, answer lengths, learning rate, speed,
    memory, what a step's time and tokens are made of, the pairs that moved most and least with their images, what was left
    out of the data, machine and versions, the recipe.

    \b
    Examples:
      fasttrain report runs/first
      fasttrain report beta01=runs/a beta05=runs/b -o runs/betas
    """
    from fasttrain.report import read_runs, write_report

    runs = read_runs(folders)
    if out is None and len(runs) > 1:
        raise UserError(f"-o: wanted a folder for the page about {len(runs)} runs, got none")
    click.echo(f"page: {write_report(runs, out or runs[0].folder, examples=examples)}")


@cli.command()
@click.argument("folders", nargs=-1, required=True, metavar="[NAME=]DIR...")
@click.option(
    "-o",
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Where the page goes.",
)
@click.option(
    "--baseline", metavar="NAME", help="The model that others are tested against. Default: the first one."
)
@click.option(
    "--resamples",
    type=click.IntRange(100),
    default=10_000,
    show_default=True,
    help="Of every interval and test.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def compare(folders: tuple[str, ...], out: Path, baseline: str | None, resamples: int, seed: int) -> None:
    """Compare models by what `fasttrain eval` wrote about them.

    Each DIR is an eval output folder, or a folder with several of them, one per benchmark. Writes comparison.html (opens
    without a network), .md, .png and .json into the output folder: scores with 95 % intervals and answer lengths, and
    paired tests of every model against the first.

    \b
    Example:
      fasttrain compare base=eval/base sft=eval/sft dpo=eval/dpo -o eval/comparison
    """
    from fasttrain.evaluate.comparing import compare as run
    from fasttrain.evaluate.comparing import read_evaluations, terminal_lines, write_comparison
    from fasttrain.pages import terminal_width

    comparison = run(read_evaluations(folders), baseline=baseline, resamples=resamples, seed=seed)
    files = write_comparison(comparison, out)
    for line in terminal_lines(comparison, terminal_width()):
        click.echo(line)
    click.echo(f"page: {files[0]}")


@cli.command()
@click.option(
    "-o", "--out", "folder", type=click.Path(path_type=Path), default="runs/demo", show_default=True
)
def demo(folder: Path) -> None:
    """Align a tiny LLaVA that ships with fasttrain, on charts drawn here, in a few minutes on a CPU.

    \b
    Example:
      fasttrain demo -o runs/demo
    """
    from fasttrain.demo.run import run_demo

    run_demo(folder, echo=click.echo)


cli.add_command(answer_command)
cli.add_command(eval_command)
cli.add_command(study_command)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _prepare_torch() -> None:
    """Settings that must stand before torch and tokenizers are imported, and other people's noise turned off."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # we fork workers after tokenizing
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # tensors in huge pages, where the kernel gives them on request
    # the drivers of WSL and of Jetson boards fail at it
    able = sys.platform == "linux" and not re.search("microsoft|tegra", platform.release(), re.IGNORECASE)
    if able and not os.environ.keys() & _ALLOCATOR:
        # no two packs are of one size: a GPU's memory that one leaves must grow together to serve the next
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    for name in ("bitsandbytes", "kernels"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(
        _is_error
    )  # it sets its level when it is imported, and writes to stdout
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\.")


def main() -> None:
    """The command in any process: how each of its ends is told stands in `fasttrain.ending`."""
    run_to_its_end(cli)


def _tell(result: str) -> None:
    """A result, on stdout, once for all ranks."""
    if is_first("RANK"):
        click.echo(result)
