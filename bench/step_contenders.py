"""The ways step.py trains one step of DPO: fasttrain, TRL's DPOTrainer, a plain Hugging Face loop, and what lies between.

Each is made from (case files) and then has one method, `step()`: forward, loss, backward, optimizer; it returns the mean
loss over the step's pairs. What can be prepared ahead of a step (decoding and tokenizing) is prepared before, for all.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from step_cases import BETA, LEARNING_RATE, Case, recipe
from torch import Tensor


@dataclass(frozen=True)
class Files:
    """Where a case was written."""

    case: Case
    model: Path
    pairs: Path
    adapter: Path
    rank: int
    folder: Path


class Contender:
    """A model with its optimizer, ready to take steps over the case's pairs."""

    def step(self) -> float:
        raise NotImplementedError


def set_adapter(model: torch.nn.Module, path: Path) -> None:
    """Overwrite the model's LoRA weights, whatever names the wrappers give them."""
    given = load_file(path)
    used = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                continue
            layer, _, kind = name.partition(".lora_")
            layer = layer.rpartition("layers.")[2]
            parameter.copy_(given[f"layers.{layer}.lora_{kind[0]}"])
            used += 1
    if used != len(given):
        raise AssertionError(f"wanted {len(given)} adapter matrices set, got {used}")


class Fasttrain(Contender):
    """The trainer's own step over its own packs. The options take single ideas out, for the ladder."""

    def __init__(
        self, files: Files, *, packed: bool = True, own_head: bool = True, own_lora: bool = True
    ) -> None:
        from fasttrain.config import config_from_dict
        from fasttrain.data.packs import plan_step
        from fasttrain.train.engine import TorchEngine
        from fasttrain.train.job import build_job
        from fasttrain.train.references import fill_references
        from fasttrain.train.step import StepRunner

        raw = recipe(
            files.model, files.pairs, files.folder, files.rank, files.case.pairs, max(files.case.groups)
        )
        raw["data"]["group_by"] = "image" if files.case.one_image else "prompt"
        with contextlib.nullcontext() if own_lora else _peft_layers():
            job = build_job(config_from_dict(raw))
        fill_references(job)
        job.policy.train()
        set_adapter(job.policy, files.adapter)
        if not own_head:
            job.policy.head.score = _plain_head(job.policy.head)
        groups = torch.arange(len(job.train)).numpy()
        largest = max(int(job.train.lengths(n).sum()) for n in range(len(job.train)))
        tokens = job.tokens_per_pack if packed else largest
        self.plan = plan_step(job.train, 1, 0.0, groups, tokens, job.policy.shared)
        maker = job.maker(job.train, with_reference=True)
        self.batches = [maker._make(pack) for pack in self.plan.packs]
        self.engine = TorchEngine(job.policy, job.config.train, job.checkpointing)
        self.runner = StepRunner(self.engine, job.loss, job.train)
        self.job = job
        self.logged = own_head  # a step whose line is written, as every one is by default and as TRL's is

    def step(self) -> float:
        result = self.runner.run(self.plan, iter(self.batches), logged=self.logged)
        self.engine.step(1.0)
        return float(result.sums[0]) / self.plan.pairs


@contextlib.contextmanager
def _peft_layers() -> Iterator[None]:
    """Models built meanwhile keep peft's LoRA layers and transformers' norms, MLPs and rotary positions, the last layer's whole."""
    from fasttrain.model import policy
    from fasttrain.train import job

    ours = job.fuse_lora, job.fuse_layers, job.fuse_rotary, policy.trim_last_layer
    job.fuse_lora = job.fuse_layers = job.fuse_rotary = lambda model: 0
    policy.trim_last_layer = lambda decoder: None
    try:
        yield
    finally:
        job.fuse_lora, job.fuse_layers, job.fuse_rotary, policy.trim_last_layer = ours


def _plain_head(head: Any) -> Callable[..., Any]:
    """Whole logits of the label rows and log_softmax, as a careful trainer without our kernel does it."""
    from fasttrain_kernels import LinearLogprob

    def score(hidden_ND: Tensor, target_N: Tensor, **wants: bool) -> Any:
        assert not any(wants.values()), wants
        logits = F.linear(hidden_ND, head.weight).float()
        return LinearLogprob(logits.log_softmax(-1).gather(-1, target_N[:, None])[:, 0])

    return score


class Plain(Contender):
    """A good hand-written loop: one sequence a pass, no padding, only label rows reach the head, adapters off for the
    reference, no checkpointing."""

    def __init__(self, files: Files) -> None:
        from peft import LoraConfig, get_peft_model

        model, processor = _load(files)
        targets = _targets(model)
        lora = LoraConfig(
            r=files.rank, lora_alpha=2 * files.rank, target_modules=targets, task_type="CAUSAL_LM"
        )
        self.peft = get_peft_model(model, lora)
        set_adapter(self.peft, files.adapter)
        self.peft.train()
        self.rows = [_encode(row, processor, files) for row in _read(files.pairs)]
        self.optimizer = torch.optim.AdamW(
            [p for p in self.peft.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
        )

    def _logp(self, inputs: dict[str, Tensor], prompt: int) -> Tensor:
        model = self.peft.get_base_model()
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[0, prompt - 1 : -1]
        logits = model.get_output_embeddings()(hidden).float()
        return logits.log_softmax(-1).gather(-1, inputs["input_ids"][0, prompt:, None]).sum()

    def step(self) -> float:
        total = 0.0
        for prompt, chosen, rejected in self.rows:
            with torch.no_grad(), self.peft.disable_adapter():
                reference = self._logp(chosen, prompt) - self._logp(rejected, prompt)
            policy = self._logp(chosen, prompt) - self._logp(rejected, prompt)
            loss = -F.logsigmoid(BETA * (policy - reference)) / len(self.rows)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.peft.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


class Trl(Contender):
    """TRL's DPOTrainer, its own collator, training step and fused head.

    Its best legal settings here: fp32 (this CPU multiplies bf16 no faster), no checkpointing, scaled-dot-product attention, and for
    text precomputed reference log-probs. `cached` and `one_image` give it what it refuses for images, for the ladder.
    """

    def __init__(self, files: Files, *, batch: int, cached: bool = False, one_image: bool = False) -> None:
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer

        model, processor = _load(files)
        lora = LoraConfig(
            r=files.rank, lora_alpha=2 * files.rank, target_modules=_targets(model), task_type="CAUSAL_LM"
        )
        args = DPOConfig(
            output_dir=str(files.folder / "trl"), per_device_train_batch_size=batch, max_length=None, bf16=False,
            gradient_checkpointing=False, precompute_ref_log_probs=not files.case.has_images, use_cpu=True,
            learning_rate=LEARNING_RATE, report_to="none", disable_tqdm=True, save_strategy="no", beta=BETA,
        )  # fmt: skip
        self.trainer = DPOTrainer(model=model, args=args, train_dataset=_dataset(files.pairs),
                                  processing_class=processor, peft_config=lora)  # fmt: skip
        set_adapter(self.trainer.model, files.adapter)
        self.trainer.model.train()
        rows = [self.trainer.train_dataset[n] for n in range(len(self.trainer.train_dataset))]
        parts = [rows[n : n + batch] for n in range(0, len(rows), batch)]
        self.batches = [self.trainer.data_collator(part) for part in parts]
        self.shares = [len(part) / len(rows) for part in parts]
        self.optimizer = self.trainer.create_optimizer()
        if cached and files.case.has_images:
            self._cache_references()
        if one_image:
            _encode_each_image_once(self.trainer.model)

    def _cache_references(self) -> None:
        for batch in self.batches:
            chosen, rejected = self.trainer.compute_ref_log_probs(self.trainer.model, batch)
            batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        self.trainer.precompute_ref_logps = True

    def step(self) -> float:
        trainer, total = self.trainer, 0.0
        for batch, share in zip(self.batches, self.shares):
            # what accumulation divides by; the last micro-batch may be smaller
            trainer.current_gradient_accumulation_steps = 1 / share
            total += float(trainer.training_step(trainer.model, dict(batch), None))
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        self.optimizer.step()
        trainer.model.zero_grad()
        return total


def _encode_each_image_once(peft: Any) -> None:
    """Run the vision tower on the first of equal images only; chosen and rejected get the same features."""
    inner = peft.get_base_model().model
    original = inner.get_image_features

    def once(pixel_values: Tensor, **options: Any) -> Any:
        kept, index = torch.unique(pixel_values, dim=0, return_inverse=True)
        out = original(pixel_values=kept, **options)
        features = out.pooler_output
        out.pooler_output = [features[i] for i in index.tolist()]
        return out

    inner.get_image_features = once


def _load(files: Files) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    auto, reader = (AutoModelForCausalLM, AutoTokenizer)
    if files.case.has_images:
        auto, reader = (AutoModelForImageTextToText, AutoProcessor)
    model = auto.from_pretrained(files.model, dtype=torch.float32, attn_implementation="sdpa")
    return model, reader.from_pretrained(files.model)


def _targets(model: Any) -> str:
    from fasttrain.model.lora import auto_targets

    return auto_targets(model)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _dataset(path: Path) -> Any:
    from datasets import Dataset, Image, List

    rows = _read(path)
    columns: dict[str, list] = {key: [row[key] for row in rows] for key in ("prompt", "chosen", "rejected")}
    if "images" not in rows[0]:
        return Dataset.from_dict(columns)
    columns["images"] = [[str(path.parent / name) for name in row["images"]] for row in rows]
    return Dataset.from_dict(columns).cast_column("images", List(Image()))


def _encode(
    row: dict[str, Any], processor: Any, files: Files
) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """(prompt length, chosen inputs, rejected inputs) of one pair, scored up to the end-of-turn token."""
    from PIL import Image

    tokenizer = getattr(processor, "tokenizer", processor)
    prompt = processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    images = [Image.open(files.pairs.parent / name) for name in row.get("images", [])]
    options = {"images": images} if images else {}
    encoded = processor(text=prompt, return_tensors="pt", add_special_tokens=False, **options)
    ids, pixels = encoded["input_ids"], {k: v for k, v in encoded.items() if k == "pixel_values"}
    sequences = []
    for key in ("chosen", "rejected"):
        answer = row[key][0]["content"] + "<|im_end|>"
        added = torch.tensor([tokenizer(answer, add_special_tokens=False)["input_ids"]])
        sequences.append({"input_ids": torch.cat([ids, added], 1), **pixels})
    return ids.shape[1], sequences[0], sequences[1]


def make(name: str, files: Files) -> Contender:
    """The contender of that name; LADDER lists the rungs in order."""
    pairs = files.case.pairs
    makers: dict[str, Callable[[], Contender]] = {
        "fasttrain": lambda: Fasttrain(files),
        "plain": lambda: Plain(files),
        "trl": lambda: Trl(files, batch=1),
        "trl-batched": lambda: Trl(files, batch=pairs),
        "cached reference": lambda: Trl(files, batch=1, cached=True),
        "one image": lambda: Trl(files, batch=1, cached=True, one_image=True),
        "shared prefix": lambda: Fasttrain(files, packed=False, own_head=False, own_lora=False),
        "packing": lambda: Fasttrain(files, own_head=False, own_lora=False),
        "head": lambda: Fasttrain(files, own_lora=False),
    }
    with contextlib.redirect_stdout(None):
        return makers[name]()


LADDER = ("trl", "cached reference", "one image", "shared prefix", "packing", "head", "fasttrain")
