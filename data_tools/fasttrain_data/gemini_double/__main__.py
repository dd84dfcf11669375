"""`python -m fasttrain_data.gemini_double`: the double as a process, for trying the tools by hand."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import click

from fasttrain_data.gemini_double.faults import FAULTS, FaultMix
from fasttrain_data.gemini_double.server import GeminiDouble, SeenCall


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--port", type=int, default=0, help="0: any free port.")
@click.option("--delay", "delay_s", type=float, default=0.0, help="Seconds a reply takes.")
@click.option("--fault", "faults", multiple=True, metavar="NAME=SHARE", help=f"One of: {', '.join(FAULTS)}.")
@click.option("--seed", type=int, default=0)
@click.option("--log", type=click.Path(path_type=Path), help="Append every call to this file as a JSON line.")
def main(port: int, delay_s: float, faults: tuple[str, ...], seed: int, log: Path | None) -> None:
    """Serve a Gemini double on 127.0.0.1 until interrupted; its judge scores by content hash."""
    try:
        mix = FaultMix({name: float(share) for name, _, share in (f.partition("=") for f in faults)}, seed)
    except ValueError as error:
        raise click.UsageError(f"--fault: {error}") from None
    lock = threading.Lock()

    def append(call: SeenCall) -> None:
        if log is not None:
            with lock, log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(call)) + "\n")

    with GeminiDouble(faults=mix, delay_s=delay_s, port=port, on_call=append, keep_calls=False) as double:
        click.echo(f"GOOGLE_GEMINI_BASE_URL={double.url} GEMINI_API_KEY={double.api_key}")
        threading.Event().wait()


main()
