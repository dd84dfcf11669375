"""Step by step, our trainer and TRL's DPOTrainer report the same losses, rewards and gradient norms.

Both start from one saved adapter and take the rows in file order, without dropout, in fp32. TRL forwards
prompt and images once per completion and model, pads, and runs its reference online; we share prompts, pack, and
read the reference from the cache. The groups of `PER_PROMPT` fill steps of four pairs exactly, so that our
steps, which take whole groups, hold TRL's batches.

TRL scores all that the template writes after the prompt; we score up to the end-of-turn token. Both are the same
with templates that write nothing after it: `CHATML_NEWLINE_FIRST` and `VICUNA`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

pytestmark = [
    # TRL 1.16 still calls transformers' checkpointing option by its old name.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]

PER_PROMPT = (1, 3, 2, 2, 1, 2, 1)  # twelve rows, three steps of four
PAIRS_PER_STEP = 4
LEARNING_RATE = 1e-3
COMPARED = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
    "grad_norm",
)


def trl_steps(
    model_folder: Path, adapter: Path, pair_file: Path, output: Path, steps: int, **options: Any
) -> list[dict[str, float]]:
    """TRL's log history, one entry a step, of a LoRA run over the rows in file order."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from trl import DPOConfig, DPOTrainer

    from fasttrain.config import ModelConfig
    from fasttrain.model.load import load_processor

    dataset = trl_dataset(pair_file)
    vision = "images" in dataset.column_names
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    base = auto.from_pretrained(model_folder, dtype=torch.float32)
    settings = {
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    trainer = DPOTrainer(
        model=PeftModel.from_pretrained(base, adapter, is_trainable=True),
        args=DPOConfig(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=PAIRS_PER_STEP,
            train_sampling_strategy="sequential",
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **(settings | options),
        ),
        train_dataset=dataset,
        # without torchvision, AutoProcessor loads no processor that also takes videos
        processing_class=load_processor(model_folder, ModelConfig(name=str(model_folder)), vision),
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def trl_dataset(pair_file: Path) -> Any:
    """The rows as TRL reads them: an `images` column of decoded images, empty for text-only rows."""
    from datasets import Dataset, Image, List

    rows = [json.loads(line) for line in pair_file.read_text(encoding="utf-8").splitlines()]
    columns: dict[str, list] = {key: [row[key] for row in rows] for key in ("prompt", "chosen", "rejected")}
    if not any("images" in row for row in rows):
        return Dataset.from_dict(columns)
    columns["images"] = [[str(pair_file.parent / name) for name in row.get("images", [])] for row in rows]
    return Dataset.from_dict(columns).cast_column("images", List(Image()))


def fasttrain_steps(
    model_folder: Path,
    adapter: Path,
    pair_file: Path,
    output: Path,
    steps: int,
    *,
    loss: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Our metrics of the same run, from a recipe file."""
    from fasttrain import load_config, train_dpo

    settings = {
        "learning_rate": LEARNING_RATE,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "grad_clip": 1.0,
        "tokens_per_pack": 110,  # several packs a step, and groups that do not fit into one
    }
    schedule = {"epochs": 100, "max_steps": steps, "pairs_per_step": PAIRS_PER_STEP, "shuffle": False}
    recipe = {
        "model": {"name": str(model_folder), "dtype": "float32"},
        "lora": {"init_from": str(adapter)},
        "data": {"train": str(pair_file), "workers": 0},
        "loss": loss or {},
        "train": {"output": str(output)} | schedule | settings | (train or {}),
        "track": [],
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return list(train_dpo(load_config(path)).metrics)


def assert_same_steps(
    ours: list[dict[str, float]], theirs: list[dict[str, float]], steps: int, beta: float = 0.1
) -> None:
    """Relative 1e-4 in every compared metric of every step.

    Rewards are beta times a difference of log-prob sums near -150, whose last fp32 bit is 1.5e-5 and which the
    two add up in different orders: they may also differ by beta x 1e-4.
    """
    assert len(ours) == len(theirs) == steps
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True), start=1):
        # While policy and reference are equal, rounding decides which reward is larger.
        tied = their["rewards/margins"] == 0
        for name in COMPARED:
            if name == "rewards/accuracies" and tied:
                continue
            absolute = beta * 1e-4 if name.startswith("rewards/") else 0.0
            absolute = 1e-6 if name.startswith("logits/") else absolute  # means near 0
            expected = pytest.approx(their[name], rel=1e-4, abs=absolute)
            assert our[name] == expected, f"step {number}, {name}"


@pytest.fixture(scope="module")
def text_model(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity") / "text"
    return tiny_models.build_text(folder, template=tiny_models.CHATML_NEWLINE_FIRST)


def test_text_steps_equal_trl(
    text_model: Path, text_pairs: Callable[..., Path], tiny_models: ModuleType, tmp_path: Path
) -> None:
    adapter = tiny_models.build_adapter(text_model, tmp_path / "adapter")
    pairs = text_pairs(tmp_path / "pairs.jsonl", 24, per_prompt=PER_PROMPT)
    theirs = trl_steps(text_model, adapter, pairs, tmp_path / "trl", 12)
    ours = fasttrain_steps(text_model, adapter, pairs, tmp_path / "ours", 12)
    assert theirs[-1]["loss"] < 0.6 < theirs[0]["loss"]  # the run moves, so later steps test the updates too
    assert_same_steps(ours, theirs, 12)


@pytest.mark.parametrize(
    ("images", "pool"),
    [((1,), None), ((1,), 2), ((1, 0, 1, 2), 3)],
    ids=["own image", "two images shared by all prompts", "text-only and two-image prompts"],
)
def test_llava_steps_equal_trl(
    images: tuple[int, ...],
    pool: int | None,
    tiny_llava: Path,
    vision_pairs: Callable[..., Path],
    tiny_models: ModuleType,
    tmp_path: Path,
) -> None:
    # B is not zero: the reference is the adapter that the run starts from, not the base model.
    adapter = tiny_models.build_adapter(tiny_llava, tmp_path / "adapter", b_std=0.05)
    pairs = vision_pairs(tmp_path / "data", 24, per_prompt=PER_PROMPT, images=images, pool=pool)
    theirs = trl_steps(tiny_llava, adapter, pairs, tmp_path / "trl", 10)
    ours = fasttrain_steps(tiny_llava, adapter, pairs, tmp_path / "ours", 10)
    assert theirs[-1]["loss"] < 0.6 < theirs[0]["loss"]
    assert_same_steps(ours, theirs, 10)


# Qwen3.5 cannot share prompts: its runs of single sequences are compared here.
@pytest.mark.parametrize(
    "family",
    [
        "Qwen2.5-VL",
        "LLaVA-NeXT",
        "LLaVA-OneVision",
        "Idefics3",
        "InternVL",
        "Gemma 3",
        "Mistral 3",
        "Qwen3.5",
    ],
)
def test_other_vision_families_steps_equal_trl(
    family: str, vision_pairs: Callable[..., Path], tiny_models: ModuleType, tiny_families: ModuleType, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Prompts of one to three images, in later turns too, some after a system's turn."""
    # nothing behind the end-of-turn token, which TRL would score
    monkeypatch.setattr(tiny_models, "CHATML", tiny_models.CHATML_NEWLINE_FIRST)
    model = tiny_families.save(tiny_models, tmp_path / "model", family)
    adapter = tiny_models.build_adapter(model, tmp_path / "adapter", b_std=0.05)
    pairs = vision_pairs(
        tmp_path / "data", 8, per_prompt=PER_PROMPT[:4], images=(1, 2, 3, 1), turns=(1, 2, 2, 1)
    )
    rows = tiny_models.read_rows(pairs)
    system = {"role": "system", "content": [{"type": "text", "text": "answer the question"}]}
    for row in rows[1:4]:
        row["prompt"].insert(0, system)
    tiny_models.write_rows(pairs, rows)
    theirs = trl_steps(model, adapter, pairs, tmp_path / "trl", 2)
    ours = fasttrain_steps(model, adapter, pairs, tmp_path / "ours", 2, train={"tokens_per_pack": 300})
    assert_same_steps(ours, theirs, 2)


# what TRL calls a setting, where it is not as we do
TRL_NAMES = {"kind": "loss_type", "f_divergence": "f_divergence_type", "f_alpha": "f_alpha_divergence_coef"}


@pytest.mark.parametrize(
    "loss",
    [
        {"kind": ["hinge"]},
        {"kind": ["ipo"]},
        {"kind": ["robust"], "label_smoothing": 0.1},
        {"kind": ["discopop"], "discopop_tau": 0.2},
        {"kind": ["sigmoid"], "f_divergence": "alpha_divergence", "f_alpha": 0.3},
    ],
    ids=lambda loss: loss["kind"][0],
)
def test_loss_kind_steps_equal_trl(
    loss: dict[str, Any],
    text_model: Path,
    text_pairs: Callable[..., Path],
    tiny_models: ModuleType,
    tmp_path: Path,
) -> None:
    adapter = tiny_models.build_adapter(text_model, tmp_path / "adapter")
    pairs = text_pairs(tmp_path / "pairs.jsonl", 24, per_prompt=PER_PROMPT)
    loss = {"beta": 0.3} | loss
    options = {TRL_NAMES.get(name, name): value for name, value in loss.items()}
    theirs = trl_steps(text_model, adapter, pairs, tmp_path / "trl", 5, **options)
    ours = fasttrain_steps(text_model, adapter, pairs, tmp_path / "ours", 5, loss=loss)
    assert_same_steps(ours, theirs, 5, beta=0.3)


def test_mixture_steps_with_the_router_loss_equal_trl(
    text_pairs: Callable[..., Path], tiny_models: ModuleType, tmp_path: Path
) -> None:
    model = tiny_models.build_mixture(tmp_path / "model", template=tiny_models.CHATML_NEWLINE_FIRST)
    adapter = tiny_models.build_adapter(model, tmp_path / "adapter")
    pairs = text_pairs(tmp_path / "pairs.jsonl", 12, per_prompt=PER_PROMPT)
    theirs = trl_steps(model, adapter, pairs, tmp_path / "trl", 3, router_aux_loss_coef=0.5)
    ours = fasttrain_steps(model, adapter, pairs, tmp_path / "ours", 3, loss={"router_aux_weight": 0.5})
    assert theirs[0]["loss"] > 1.0  # 0.69 without it
    assert_same_steps(ours, theirs, 3)
    for our, their in zip(ours, theirs, strict=True):
        assert our["aux_loss"] == pytest.approx(their["aux_loss"], rel=1e-5)


MIN_RATE = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.2}}
ADAM = {"adam_beta1": 0.7, "adam_beta2": 0.95, "adam_epsilon": 1e-4}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"lr_scheduler_type": "linear"}, {"schedule": "linear", "warmup_ratio": 0.25}),
        (
            MIN_RATE | ADAM,
            {"schedule": "cosine", "min_rate": 0.2, "warmup_steps": 2, "betas": [0.7, 0.95], "eps": 1e-4},
        ),
    ],
    ids=["linear", "cosine that ends above 0"],
)
def test_optimizer_and_schedule_equal_trl(
    theirs: dict[str, Any], ours: dict[str, Any], text_model: Path, text_pairs: Callable[..., Path],
    tiny_models: ModuleType, tmp_path: Path,
) -> None:  # fmt: skip
    adapter = tiny_models.build_adapter(text_model, tmp_path / "adapter")
    pairs = text_pairs(tmp_path / "pairs.jsonl", 24, per_prompt=PER_PROMPT)
    options = {"warmup_steps": 2, "weight_decay": 5.0, "max_grad_norm": 3.0} | theirs
    train = {"weight_decay": 5.0, "grad_clip": 3.0} | ours
    expected = trl_steps(text_model, adapter, pairs, tmp_path / "trl", 8, **options)
    found = fasttrain_steps(text_model, adapter, pairs, tmp_path / "ours", 8, train=train)
    assert_same_steps(found, expected, 8)
