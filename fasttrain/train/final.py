"""`final/`: the trained adapter in PEFT's format, or the whole model, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fasttrain import __version__
from fasttrain.files import atomic_folder
from fasttrain.model.no_videos import save_processor
from fasttrain.train.job import Job
from fasttrain.train.metrics import read_metrics
from fasttrain.train.optimizer import MasterOptimizer


def write_final(job: Job, optimizer: MasterOptimizer, folder: Path) -> Path:
    """Write `final/` whole; adapters in fp32 master precision, a fully tuned model in the model's own dtype."""
    target = folder / "final"
    with atomic_folder(target) as temporary:
        if job.adapted is not None:
            masters = {name.removeprefix("model."): value for name, value in optimizer.weights().items()}
            state = _adapter_state(job.adapted, masters)
            about = job.adapted.peft_config["default"]  # a hub model was loaded from a folder of this machine
            about.base_model_name_or_path, about.revision = job.config.model.name, job.config.model.revision
            job.adapted.save_pretrained(temporary, state_dict=state, save_embedding_layers=False)
        else:
            job.policy.model.save_pretrained(temporary)
        save_processor(job.processor, job.model_folder, temporary)
        (temporary / "README.md").write_text(model_card(job, folder), encoding="utf-8")
    return target


def _adapter_state(adapted: Any, masters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapted model's state with trained parameters replaced by their masters, under peft's names."""
    state: dict[str, torch.Tensor] = adapted.state_dict()
    prefix = "base_model.model."
    for name, value in masters.items():
        if prefix + name not in state:
            raise KeyError(f"{prefix + name} is not in the adapted model's state")
        state[prefix + name] = value
    return state


def model_card(job: Job, folder: Path) -> str:
    """What the adapter is, how to load it, and how it was made; figures are read from the run's own files."""
    lines = read_metrics(folder / "metrics.jsonl")
    config, account = job.config, job.train.account
    last = lines[-1] if lines else {}
    table = "\n".join(
        f"| {name} | {last[name]:.4f} |"
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
        if name in last
    )
    spent = sum(line["step_s"] for line in lines)
    kind = "LoRA adapter" if job.adapted is not None else "model"
    return f"""---
base_model: {config.model.name}
{"library_name: peft" if job.adapted is not None else "library_name: transformers"}
tags: [{job.loss.command}, fasttrain{", lora" if job.adapted is not None else ""}]
---

# {folder.name}

A {kind} trained with {job.loss.title} by fasttrain {__version__} from `{config.model.name}`.

## Use

```python
{_usage(job)}
```

## Training

{account.pairs:,} {job.loss.unit} in {account.groups:,} groups of one prompt, {account.images:,} images; {len(account.skipped):,} rows \
left out ({account.truncated:,} completions truncated). Loss `{config.loss.kind}`, beta {config.loss.beta}, \
{last.get("step", 0):,} steps of at least {config.train.pairs_per_step} pairs, peak learning rate \
{config.train.learning_rate:g}, seed {config.train.seed}; {spent:,.0f} s in logged steps on {_device(job)}.
Data: {", ".join(f"`{Path(name).name}`" for name in _files(config.data.train))}. The whole recipe is `config.yaml` of the run.

| last step | |
|---|---|
{table}
"""


def _files(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def _device(job: Job) -> str:
    from fasttrain.environment import _cpu_name

    return torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else _cpu_name()


def _usage(job: Job) -> str:
    vision = job.chat.pixels is not None
    auto = "LlavaForConditionalGeneration" if vision else "AutoModelForCausalLM"
    tool = "AutoProcessor" if vision else "AutoTokenizer"
    head = [f"from transformers import {', '.join(sorted([auto, tool]))}"]
    name = job.config.model.name
    if job.adapted is not None:
        head.insert(0, "from peft import PeftModel")
        load = [f'model = PeftModel.from_pretrained({auto}.from_pretrained("{name}"), "final")']
    else:
        load = [f'model = {auto}.from_pretrained("final")']
    if vision:
        head.insert(0, "from PIL import Image")
        ask = [
            f'processor = {tool}.from_pretrained("final")',
            'content = [{"type": "image"}, {"type": "text", "text": "What does the picture show?"}]',
            'prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)',
            'inputs = processor(images=Image.open("picture.jpg"), text=prompt, add_special_tokens=False, return_tensors="pt")',
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
