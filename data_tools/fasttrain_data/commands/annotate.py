"""`fasttrain-data annotate`: completions.jsonl -> annotations.jsonl, by Gemini."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fasttrain_data.commands.options import EXISTING_FILE, SECONDS, Number, image_root_option, output_option
from fasttrain_data.errors import EXIT_TYPED_FAILURES

if TYPE_CHECKING:
    from fasttrain_data.annotations.run import AnnotateResult, Forecast

_NO_PRICE = "(no price for this model today: --prices FILE)"
_RETRIED = "quota, rate_limited, server_error, timeout"


@click.command("annotate", short_help="Let Gemini mark every completion.")
@click.argument("completions", type=EXISTING_FILE)
@output_option
@click.option(
    "--model",
    required=True,
    help="Judge model, as the API names it. There is no default: models come and go.",
)
@click.option(
    "--sdk",
    type=click.Choice(["google-genai", "google-generativeai"]),
    default="google-genai",
    show_default=True,
    help="google-generativeai is no longer developed; extra gemini-legacy.",
)
@click.option("--base-url", help="Another server. Default: $GOOGLE_GEMINI_BASE_URL, else Google's.")
@click.option("--api-version", help="Default: the SDK's own (google-genai only).")
@click.option(
    "--votes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Calls per prompt; scores are medians.",
)
@click.option(
    "--recheck",
    type=Number(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the prompts asked once more in another order, for agreement statistics only.",
)
@click.option(
    "--mode",
    type=click.Choice(["together", "single"]),
    default="together",
    show_default=True,
    help="All answers of a prompt in one call, or one call per answer.",
)
@click.option("--temperature", type=Number(0), default=0.0, show_default=True)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Decides the order answers are shown in."
)
@click.option("--max-output-tokens", type=click.IntRange(64), default=8192, show_default=True)
@click.option("--rpm", type=Number(0, min_open=True), help="Requests per minute, at most.")
@click.option("--tpm", type=click.IntRange(1), help="Tokens per minute, at most, by estimate.")
@click.option(
    "--in-flight",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Calls at the same time, at most.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=SECONDS,
    default=120.0,
    show_default=True,
    help="Seconds.",
)
@click.option("--attempts", type=click.IntRange(1), default=5, show_default=True, help="Per call and run.")
@click.option(
    "--backoff",
    "backoff_s",
    type=Number(0),
    default=1.0,
    show_default=True,
    help="First wait in seconds, doubled; a server that names a delay is obeyed instead.",
)
@click.option(
    "--retry",
    multiple=True,
    metavar="STATUS",
    help=f"Also try this status again, besides {_RETRIED}. Repeatable.",
)
@click.option(
    "--allow-mixed-versions", is_flag=True, help="Keep replies of several model versions in one file."
)
@click.option(
    "--batch", is_flag=True, help="Batch API: half price, may take a day; start again to go on waiting."
)
@click.option(
    "--poll",
    "poll_s",
    type=Number(0, 1_000_000),
    default=30.0,
    show_default=True,
    help="Seconds between looks at a batch.",
)
@click.option(
    "--max-cost",
    "max_cost_usd",
    type=Number(0),
    metavar="USD",
    help="No call that could take the journal's total beyond this.",
)
@click.option(
    "--prices", type=EXISTING_FILE, help="Price table; default: the one that comes with the package."
)
@click.option("--dry-run", is_flag=True, help="Print calls, tokens and money; call nothing.")
@image_root_option
def annotate_command(completions: Path, output: Path, dry_run: bool, **options: Any) -> int:
    """Let Gemini mark every completion on the five HelpSteer attributes, 0 to 4.

    The key comes from GEMINI_API_KEY or GOOGLE_API_KEY. Every reply is kept, those for annotations.jsonl in
    annotations.journal.jsonl, under a hash of its request: start the same command again after a stop, and no
    reply is paid for twice. Exit code 3 when some prompts ended in a typed failure.

    Example: fasttrain-data annotate completions.jsonl -o annotations.jsonl --model gemini-3.8-flash --rpm 600
    --in-flight 64
    """
    from fasttrain_data.annotations.judge import endpoint_from_environment, open_judge
    from fasttrain_data.annotations.run import annotate, forecast
    from fasttrain_data.annotations.settings import AnnotateSettings
    from fasttrain_data.calls.dispatch import CallLimits

    endpoint_options = [options.pop(name) for name in ("base_url", "api_version", "timeout_s")]
    names = ("rpm", "tpm", "in_flight", "attempts", "backoff_s")
    limits = CallLimits(**{name: options.pop(name) for name in names})
    settings = AnnotateSettings(limits=limits, **{**options, "retry": _statuses(options["retry"])})
    if dry_run:
        _print_forecast(forecast(completions, output, settings))
        return 0
    judge = open_judge(settings.sdk, endpoint_from_environment(*endpoint_options))
    return _print_result(annotate(completions, output, settings, judge), output)


def _statuses(extra: tuple[str, ...]) -> frozenset[str]:
    from typing import get_args

    from fasttrain_data.records import TRANSIENT, Status

    known = [status for status in get_args(Status) if status != "ok"]
    for status in extra:
        if status not in known:
            raise click.BadParameter(
                f"wanted one of {', '.join(known)}, got {status!r}", param_hint="--retry"
            )
    return TRANSIENT | frozenset(extra)


def _print_forecast(plan: Forecast) -> None:
    click.echo(f"prompts            {plan.prompts:>12,}")
    click.echo(f"calls to make      {plan.calls:>12,}")
    click.echo(f"calls in journal   {plan.calls_in_journal:>12,}")
    if plan.bad_images:
        click.echo(f"prompts with a bad image {plan.bad_images:>6,}")
    basis = "mean of the replies in the journal" if plan.measured else "rough estimate before the first reply"
    click.echo(f"prompt tokens      {plan.prompt_tokens:>12,}  ({basis})")
    click.echo(f"output tokens      {plan.output_tokens:>12,}")
    if plan.price is None or plan.usd is None:
        click.echo(f"cost                    unknown  {_NO_PRICE}")
    else:
        click.echo(
            f"cost               {plan.usd:>12,.2f}  USD at {plan.price.input_usd:g} / {plan.price.output_usd:g} "
            f"per million (price of {plan.price.since}); {plan.spent_usd:,.2f} USD spent so far"
        )


def _print_result(result: AnnotateResult, output: Path) -> int:
    totals = result.totals
    money = f"{totals.usd:,.4f} USD; journal {result.spent_usd:,.4f} USD"
    click.echo(
        f"this run: {totals.replies:,} replies, {totals.failures:,} calls without reply, {totals.prompt_tokens:,} prompt "
        f"and {totals.output_tokens:,} output tokens, {money if result.price else f'cost unknown {_NO_PRICE}'}"
    )
    for flag, count in result.flags.most_common():
        click.echo(f"  flagged {count:>8,}  {flag}")
    for status, count in result.statuses.most_common():
        detail = result.details[status]
        click.echo(f"  {count:>8,}  {status}" + (f", the first: {detail}" if detail else ""))
    for note in result.notes:
        click.echo(note)
    if result.stopped:
        click.echo(f"stopped early: {result.stopped}", err=True)
    failed = result.statuses.total() - result.statuses["ok"]
    click.echo(f"{output}: {result.statuses.total():,} prompts, {result.statuses['ok']:,} annotated")
    return EXIT_TYPED_FAILURES if failed else 0
