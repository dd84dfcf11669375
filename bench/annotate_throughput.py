"""How close annotation comes to the allowed request rate, and whether its memory stays flat.

The Gemini double and the command run as processes of their own, over real HTTP and the unmodified SDK.

    python bench/annotate_throughput.py rate                     # 600 RPM, 64 in flight, replies after 1 s
    python bench/annotate_throughput.py memory --prompts 100000  # resident memory while the file grows
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click


@contextmanager
def double(log: Path | None, delay_s: float) -> Iterator[dict[str, str]]:
    """The double as a process; yields the environment that points at it."""
    command = [sys.executable, "-m", "fasttrain_data.gemini_double", "--delay", str(delay_s)]
    command += ["--log", str(log)] if log else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield {**os.environ, **dict(re.findall(r"(\w+)=(\S+)", process.stdout.readline()))}
    finally:
        process.terminate()
        process.wait()


def write_completions(path: Path, prompts: int, answers: int = 4) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(prompts):
            for sample in range(answers):
                row = {
                    "id": f"{number}-{sample}",
                    "question_id": str(number),
                    "question": f"What does figure {number} show, and what follows from it?",
                    "text": f"Sample {sample} of an answer to question {number}. " * 8,
                }
                file.write(json.dumps(row) + "\n")


def annotate(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fasttrain_data", "annotate", str(folder / "completions.jsonl")]
    command += ["-o", str(folder / "annotations.jsonl"), "--model", "gemini-3.8-flash", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def machine() -> str:
    from importlib.metadata import version

    cores = len(os.sched_getaffinity(0))
    return (
        f"{platform.machine()}, {cores} cores, Python {platform.python_version()}, "
        f"google-genai {version('google-genai')}, {time.strftime('%Y-%m-%d')}"
    )


@click.group()
def main() -> None:
    """Measure annotation against the local double."""


@main.command()
@click.option("--prompts", default=1200, show_default=True, help="One call each.")
@click.option("--rpm", default=600, show_default=True)
@click.option("--in-flight", default=64, show_default=True)
@click.option("--delay", default=1.0, show_default=True, help="Seconds a reply takes.")
def rate(prompts: int, rpm: int, in_flight: int, delay: float) -> None:
    """Calls per minute, from the first call's start to the last one's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_completions(folder / "completions.jsonl", prompts)
        log = folder / "calls.jsonl"
        with double(log, delay) as environment:
            process = annotate(folder, environment, "--rpm", str(rpm), "--in-flight", str(in_flight))
            out, _ = process.communicate()
        starts = sorted(json.loads(line)["started_s"] for line in log.read_text().splitlines())
    if process.returncode or len(starts) != prompts:
        raise SystemExit(f"annotate ended with {process.returncode}: {out}")
    achieved = 60 * (len(starts) - 1) / (starts[-1] - starts[0])
    busiest = max(sum(1 for other in starts if start <= other < start + 60) for start in starts)
    click.echo(machine())
    click.echo(
        f"{prompts:,} calls, allowed {rpm} per minute: {achieved:.1f} per minute ({achieved / rpm:.1%}); "
        f"most in any 60 s: {busiest}"
    )


@main.command()
@click.option("--prompts", default=100_000, show_default=True)
@click.option("--in-flight", default=8, show_default=True)
def memory(prompts: int, in_flight: int) -> None:
    """Resident memory of the annotating process while it works."""
    samples: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_completions(folder / "completions.jsonl", prompts)
        journal = folder / "annotations.journal.jsonl"
        with double(None, 0.0) as environment:
            started_s = time.monotonic()
            process = annotate(folder, environment, "--in-flight", str(in_flight))
            while process.poll() is None:
                grown = journal.stat().st_size if journal.exists() else 0
                if (resident := resident_mb(process.pid)) is not None:
                    samples.append((grown / 1e6, resident))
                time.sleep(1)
            out = process.stdout.read() if process.stdout else ""
        seconds = time.monotonic() - started_s
        again = annotate(folder, environment)  # the double is gone: every reply must come from the journal
        again_out, _ = again.communicate()
    click.echo(machine())
    click.echo(out.strip().splitlines()[-1])
    click.echo(f"{seconds:.0f} s; resident memory in MB by size of the journal in MB:")
    last = samples[-1][0]
    for share in (0.01, 0.1, 0.25, 0.5, 0.75, 1.0):
        size, resident = min(samples, key=lambda sample: abs(sample[0] - share * last))
        click.echo(f"  {size:8.1f}  {resident:7.1f}")
    click.echo(f"  largest   {max(resident for _, resident in samples):7.1f}")
    click.echo(f"rerun without a server: exit {again.returncode}, {again_out.strip().splitlines()[0]}")


def resident_mb(pid: int) -> float | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(match[1]) / 1024 if match else None


if __name__ == "__main__":
    main()
