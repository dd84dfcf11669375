"""What `answer` and `eval` share on the command line: who answers, and how. Nothing heavy is imported here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fasttrain.errors import UserError, mistakes_of_data_tools
from fasttrain_data.commands.options import SECONDS, Number

if TYPE_CHECKING:
    from fasttrain.answering.decoding import Decoding
    from fasttrain.answering.run import Answerer

Command = TypeVar("Command", bound=Callable[..., Any])

_MODEL = (
    click.option("-a", "--adapter", type=click.Path(path_type=Path), help="PEFT adapter, or the run folder that holds it in final/."),
    click.option("--revision", help="Hub revision of the model."),
    click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto", show_default=True, help="auto: bfloat16 on CUDA, float32 on CPU."),
    click.option("--quantize", type=click.Choice(["nf4"]), help="Quantise the model with bitsandbytes."),
    click.option("--bos", type=click.Choice(["template", "tokenizer"]), help="As model.bos in a recipe. Default: as the adapter's run did, else template."),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model, as model.trust_remote_code in a recipe."),
    click.option("--model-id", help="What the answers are signed with. Default: the run's or the model's name."),
)  # fmt: skip
_DECODING = (
    click.option("--temperature", type=Number(0), default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-p", type=Number(0, 1, min_open=True), default=1.0, show_default=True),
    click.option("--seed", type=int, default=0, show_default=True, help="Of sampling; every question has its own from it."),
)  # fmt: skip
_WORK = (
    click.option("--batch-size", type=click.IntRange(1), help="Most questions at once. Default: 64, or what memory holds."),
    click.option("--tokens-per-batch", type=click.IntRange(1), help="Most tokens at once, those to come included. Default: what memory holds."),
    click.option("--server", metavar="URL", help="Ask an OpenAI-compatible server instead; -m is the model's name there, the key in $OPENAI_API_KEY."),
    click.option("--timeout", "timeout_s", type=SECONDS, default=300.0, show_default=True, help="Seconds for a reply of the server."),
)  # fmt: skip
_LIMITS = (
    click.option("--in-flight", type=click.IntRange(1), default=16, show_default=True, help="Requests to the server at the same time."),
    click.option("--rpm", type=Number(0, min_open=True), help="Requests to the server per minute."),
    click.option("--attempts", type=click.IntRange(1), default=5, show_default=True, help="Requests for one answer, at most."),
)  # fmt: skip

_OPTIONS = {
    "model.name:": "--model:", "model.revision:": "--revision:", "model.quantize:": "--quantize:",
    "model.trust_remote_code": "--trust-remote-code", "lora.init_from:": "--adapter:",
}  # fmt: skip


def answering_options(command: Command) -> Command:
    """Adds the options that `AnswerOptions` holds, but for the limits of calls to a server."""
    for option in reversed((*_MODEL, *_DECODING, *_WORK)):
        command = option(command)
    return command


def call_limit_options(command: Command) -> Command:
    """Adds the limits of calls; `eval` has them from its judge."""
    for option in reversed(_LIMITS):
        command = option(command)
    return command


@contextlib.contextmanager
def by_options() -> Iterator[None]:
    """Mistakes of a recipe's settings told as those of the options that stand for them here."""
    try:
        yield
    except UserError as error:
        told = str(error)
        for setting, option in _OPTIONS.items():
            told = told.replace(setting, option, 1)
        raise UserError(told) from None


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """The shared options, with the model."""

    model: str
    adapter: Path | None
    revision: str | None
    dtype: Any
    quantize: Any
    bos: Any
    trust_remote_code: bool
    model_id: str | None
    temperature: float
    top_p: float
    seed: int
    batch_size: int | None
    tokens_per_batch: int | None
    server: str | None
    in_flight: int
    rpm: float | None
    timeout_s: float
    attempts: int

    def name(self) -> str:
        from fasttrain.answering.records import model_name

        return self.model_id or model_name(self.model, self.adapter)

    def decoding(self, max_new_tokens: int) -> Decoding:
        from fasttrain.answering.decoding import Decoding

        return Decoding(
            max_new_tokens=max_new_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed
        )

    def answerer(self) -> Answerer:
        """The model or the server; UserError for a mistake in either."""
        if self.server is not None:
            return self._server()
        from fasttrain.answering.local import LocalModel, bos_of_run
        from fasttrain.config import ModelConfig

        with by_options():
            bos: Any = self.bos or (bos_of_run(self.adapter) if self.adapter is not None else "template")
            config = ModelConfig(
                name=self.model, revision=self.revision, dtype=self.dtype, quantize=self.quantize, bos=bos,
                trust_remote_code=self.trust_remote_code,
            )  # fmt: skip
            return LocalModel(config, self.adapter, rows=self.batch_size, tokens=self.tokens_per_batch)

    def _server(self) -> Answerer:
        from fasttrain.answering.server import ServerModel
        from fasttrain_data.calls.dispatch import CallLimits

        for name in (
            "adapter", "revision", "quantize", "bos", "trust_remote_code", "batch_size", "tokens_per_batch",
        ):  # fmt: skip
            if getattr(self, name) not in (None, False):
                raise UserError(
                    f"--{name.replace('_', '-')}: wanted with a model in this process, got it with --server"
                )
        assert self.server is not None
        limits = CallLimits(rpm=self.rpm, in_flight=self.in_flight, attempts=self.attempts)
        with mistakes_of_data_tools():
            return ServerModel(self.server, self.model, limits, self.timeout_s)
