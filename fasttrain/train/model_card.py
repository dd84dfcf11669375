"""The model card of `final/`: use, data and where it came from, licences, recipe, results, time and energy.

Every figure is read from the run's own files; what is an estimate says so, with its formula.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fasttrain import __version__
from fasttrain.files import hash_file, user_path
from fasttrain.model.folder import card_line
from fasttrain.pages import inert
from fasttrain.run_lines import read_steps
from fasttrain.train.job import Job

_LOOKED_AT = 20_000  # rows in which provenance is looked for

# What a source's publishers say; keys are looked for in the rows' own words and in file names.
LICENCES = {
    "scigraphqa": "SciGraphQA: unclear. Its repository says Apache-2.0, its data card MIT, its README research use only.",
    "lrv": "LRV-Instruction: BSD-3-Clause; its photos are Visual Genome's, CC BY 4.0.",
    "helpsteer": "HelpSteer: CC BY 4.0, attribution wanted (NVIDIA).",
    "rlaif": "RLAIF-V: see the terms on its data card; its images keep their own licences.",
    "vlfeedback": "VLFeedback: see its data card; its images keep their own licences.",
    "charts": "fasttrain's charts: drawn by this project, Apache-2.0.",
}
# Board power of the vendors' data sheets, in watts.
GPU_WATTS = {
    "A100": 400,
    "H100 PCIe": 350,
    "H100": 700,
    "H200": 700,
    "B200": 1000,
    "L40S": 350,
    "A10": 150,
    "4090": 450,
}
_RESULTS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "mean_token_accuracy", "entropy",
)  # fmt: skip


def model_card(job: Job, folder: Path) -> str:
    """The card as Markdown with Hugging Face's header."""
    lines = read_steps(folder / "metrics.jsonl")
    config = job.config
    adapter = job.adapted is not None
    kind = "LoRA adapter" if adapter else "model"
    parts = [
        f"""---
{card_line(config.model.name)}{"library_name: peft" if adapter else "library_name: transformers"}
tags: [{job.loss.command}, fasttrain{", lora" if adapter else ""}]
---

# {inert(folder.name)}

A {kind} trained with {job.loss.title} by fasttrain {__version__} from `{config.model.name}`.
""",
        f"## Use\n\n```python\n{_usage(job)}\n```\n",
        "## Data\n\n" + "\n".join(_data(job)) + "\n",
        "## Licences\n\n" + "\n".join(_licences(job)) + "\n",
        "## Recipe\n\n" + "\n".join(_recipe(job, lines)) + "\n",
        "## Results\n\n" + "\n".join(_results(lines)) + "\n",
        "## Time and energy\n\n" + "\n".join(_spent(job, lines)) + "\n",
    ]
    return "\n".join(parts)


def _data(job: Job) -> Iterator[str]:
    account, unit = job.train.account, job.loss.unit
    yield (
        f"{account.pairs:,} {unit} in {account.groups:,} groups, one a prompt, {account.images:,} images; "
        f"{len(account.skipped):,} rows left out, {account.truncated:,} completions truncated."
    )
    yield ""
    for name in _listed(job.config.data.train):
        path = user_path(name)
        digest = f", BLAKE2b-128 `{hash_file(path)}`" if path.is_file() else ""
        yield f"* `{path.name}`{digest}"
    facts = _provenance(job)
    for label, values in facts.items():
        shown = ", ".join(f"{inert(value)} ({count:,})" for value, count in values.most_common(6))
        yield f"* {label}: {shown}{', ...' if len(values) > 6 else ''}"
    if not facts:
        yield "* The rows do not say where they came from, who graded them or by which rule they were made."
    if job.train.account.rows > _LOOKED_AT:
        yield f"* Provenance is that of the first {_LOOKED_AT:,} of {job.train.account.rows:,} rows."


def _provenance(job: Job) -> dict[str, Counter[str]]:
    """What the rows say of themselves, counted."""
    found: dict[str, Counter[str]] = {}
    for row in _rows(job):
        rule = row.get("rule")
        said = {
            "source": row.get("source") or row.get("origin_dataset") or row.get("ds_name"),
            "graded by": row.get("annotator_version") or row.get("annotator"),
            "rule": ", ".join(f"{key} {value}" for key, value in rule.items())
            if isinstance(rule, dict)
            else None,
            "made by": row.get("tool"),
            "labels": "swapped on purpose" if row.get("flipped") else None,
        }
        for label, value in said.items():
            if isinstance(value, str) and value.strip():
                found.setdefault(label, Counter())[" ".join(value.split())[:120]] += 1
    return found


def _rows(job: Job) -> Iterator[dict[str, Any]]:
    from fasttrain.data.bad_row import BadRow
    from fasttrain.data.sources import iterate

    sources = job.train.files.sources
    for index, number in itertools.islice(iterate(sources), _LOOKED_AT):
        try:
            yield sources[index].row(number)
        except BadRow:  # listed in skipped.jsonl
            continue


def _licences(job: Job) -> Iterator[str]:
    """Notes on the sources that can be recognised, and what to check where none can."""
    words = " ".join([*_listed(job.config.data.train), *_provenance(job).get("source", ())]).lower()
    known = [note for key, note in LICENCES.items() if key in words]
    yield f"* Base model: under the licence of `{job.config.model.name}`; an adapter is of use only with it."
    yield from (f"* {note}" for note in known)
    if not known:
        yield "* Data: no source with known terms was recognised; state the terms of yours before you publish this."
    yield "* Grades and answers written by a model may come under the terms of the service that made them."


def _recipe(job: Job, lines: list[dict[str, Any]]) -> Iterator[str]:
    config, train = job.config, job.config.train
    kinds = " + ".join(f"`{kind}`" for kind in _listed(config.loss.kind))
    loss = f"loss {kinds}, beta {config.loss.beta}" if job.loss.needs_reference else "cross-entropy"
    tuned = "the whole language model"
    if job.adapted is not None:  # the recipe may leave both to the adapter it starts from
        adapter = job.adapted.peft_config["default"]
        tuned = f"LoRA rank {adapter.r}, alpha {adapter.lora_alpha:g}"
    yield (
        f"{tuned}{', projector too' if config.model.train_projector else ''}; {loss}; "
        f"{lines[-1].get('step', 0) if lines else 0:,} steps of at least {train.pairs_per_step} {job.loss.unit}, peak learning "
        f"rate {train.learning_rate:g}, {train.schedule} schedule, seed {train.seed}. The whole recipe is `config.yaml` of the run."
    )


def _results(lines: list[dict[str, Any]]) -> Iterator[str]:
    if not lines:
        yield "No step was logged."
        return
    first, last = lines[0], lines[-1]
    names = [name for name in _RESULTS if name in last]
    names += [name for name in last if name.startswith("eval_") and isinstance(last[name], int | float)]
    yield f"| | step {first.get('step', 0):,} | step {last.get('step', 0):,} |"
    yield "|---|---|---|"
    for name in names:
        before = f"{first[name]:.4f}" if name in first else ""
        yield f"| {name} | {before} | {last[name]:.4f} |"
    yield ""
    yield "These are figures of training, not of answering: `fasttrain eval` and `fasttrain answer` measure that."


def _spent(job: Job, lines: list[dict[str, Any]]) -> Iterator[str]:
    seconds = sum(line["step_s"] for line in lines)
    device = _device(job)
    yield (
        f"{seconds:,.0f} s in logged steps ({seconds / 3600:.3g} h), measured, on {device}; loading, reference log-probs and "
        "evaluation come on top."
    )
    yield ""
    watts = next((watts for name, watts in GPU_WATTS.items() if name in device), None)
    if job.device.type == "cuda" and watts is not None:
        kwh = watts * seconds / 3.6e6
        yield f"Energy: at most about {kwh:.2f} kWh a device (estimate: {watts} W of the data sheet x that time; nothing was metered)."
    else:
        yield "Energy: not metered. An estimate is the machine's power draw in watts x the seconds / 3.6e6, in kWh."
    yield "Cost and carbon follow from it: hours x the price of the machine, kWh x the grid's grams of CO2 per kWh."


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _device(job: Job) -> str:
    from fasttrain.environment import _cpu_name

    return torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else _cpu_name()


def _usage(job: Job) -> str:
    vision = job.chat.pixels is not None
    auto = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    tool = "AutoProcessor" if vision else "AutoTokenizer"
    head = [f"from transformers import {', '.join(sorted([auto, tool]))}"]
    name = job.config.model.name
    if job.adapted is not None:
        head.insert(0, "from peft import PeftModel")
        load = [
            f'model = PeftModel.from_pretrained({auto}.from_pretrained({json.dumps(name, ensure_ascii=False)}), "final")'
        ]
    else:
        load = [f'model = {auto}.from_pretrained("final")']
    added = "" if job.config.model.bos == "tokenizer" else ", add_special_tokens=False"
    if vision:
        head.insert(0, "from PIL import Image")
        ask = [
            f'processor = {tool}.from_pretrained("final")',
            'content = [{"type": "image"}, {"type": "text", "text": "What does the picture show?"}]',
            'prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)',
            f'inputs = processor(images=Image.open("picture.jpg"), text=prompt{added}, return_tensors="pt")',
            "answer = model.generate(**inputs, max_new_tokens=200, do_sample=False)",
            'print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    else:
        ask = [
            f'tokenizer = {tool}.from_pretrained("final")',
            'messages = [{"role": "user", "content": "What is the capital of France?"}]',
            'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
            "answer = model.generate(**inputs, max_new_tokens=200, do_sample=False)",
            'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    return "\n".join([*head, "", *load, *ask])
