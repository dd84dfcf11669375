"""`fasttrain sft`: TRL's and Hugging Face's numbers, whatever is shared or packed, from the arms' files or pair files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fasttrain import UserError, train_dpo, train_sft
from fasttrain.config import config_from_dict

pytestmark = [
    # TRL 1.16 still calls transformers' checkpointing option by its old name.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]

PER_PROMPT = (1, 3, 2, 2, 1, 2, 1)  # twelve rows, three steps of four
PER_STEP = 4


def sft_steps(
    model: Path, adapter: Path, data: Path, output: Path, steps: int, **train: Any
) -> list[dict[str, Any]]:
    """Our metrics, rows in file order, from a saved adapter without dropout."""
    settings = {
        "learning_rate": 1e-2, "schedule": "constant", "warmup_ratio": 0.0, "tokens_per_pack": 110, "epochs": 100,
        "max_steps": steps, "pairs_per_step": PER_STEP, "shuffle": False, "output": str(output),
    }  # fmt: skip
    recipe = {
        "model": {"name": str(model), "dtype": "float32"},
        "lora": {"init_from": str(adapter)},
        "data": {"train": str(data), "workers": 0},
        "train": settings | train,
        "track": [],
    }
    resume = bool(recipe["train"].pop("resume", False))  # type: ignore[attr-defined]
    return list(train_sft(config_from_dict(recipe), resume=resume).metrics)


def trl_steps(
    model: Path, adapter: Path, data: Path, output: Path, steps: int, **options: Any
) -> list[dict[str, Any]]:
    """TRL's log of a run with loss on completions only, one entry a step."""
    from datasets import Dataset, Image, List
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    dataset = Dataset.from_dict(
        {"prompt": [row["prompt"] for row in rows], "completion": [row["chosen"] for row in rows]}
    )
    auto, reader = (AutoModelForCausalLM, AutoTokenizer)
    if "images" in rows[0]:
        auto, reader = (AutoModelForImageTextToText, AutoProcessor)
        images = [[str(data.parent / name) for name in row["images"]] for row in rows]
        dataset = dataset.add_column("images", images).cast_column("images", List(Image()))
    settings = {"per_device_train_batch_size": PER_STEP, "gradient_accumulation_steps": 1}
    trainer = SFTTrainer(
        model=PeftModel.from_pretrained(auto.from_pretrained(model, dtype=torch.float32), adapter, is_trainable=True),
        args=SFTConfig(
            output_dir=str(output), max_steps=steps, learning_rate=1e-2, lr_scheduler_type="constant",
            train_sampling_strategy="sequential", use_cpu=True, logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, max_length=None, bf16=False, gradient_checkpointing=False, completion_only_loss=True,
            max_grad_norm=1.0, **(settings | options),
        ),
        train_dataset=dataset,
        processing_class=reader.from_pretrained(model),
    )  # fmt: skip
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], steps: int, names: tuple[str, ...]
) -> None:
    assert len(ours) == len(theirs) == steps
    assert ours[-1]["loss"] < 0.99 * ours[0]["loss"]  # the run moves
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True), start=1):
        for name in names:
            assert our[name] == pytest.approx(their[name], rel=1e-4), f"step {number}, {name}"


@pytest.fixture(scope="module")
def text_model(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft") / "text"
    return tiny_models.build_text(folder, template=tiny_models.CHATML_NEWLINE_FIRST)


@pytest.fixture
def adapter(text_model: Path, tiny_models: ModuleType, tmp_path: Path) -> Path:
    return tiny_models.build_adapter(text_model, tmp_path / "adapter", b_std=0.05)


@pytest.fixture
def pairs(text_pairs: Callable[..., Path], tmp_path: Path) -> Path:
    return text_pairs(tmp_path / "pairs.jsonl", 24, per_prompt=PER_PROMPT)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_text_steps_equal_trl(
    accumulation: int, text_model: Path, adapter: Path, pairs: Path, tmp_path: Path
) -> None:
    """Also with accumulation, where a mean of means would weigh micro-batches alike."""
    batches = {
        "per_device_train_batch_size": PER_STEP // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    theirs = trl_steps(text_model, adapter, pairs, tmp_path / "trl", 9, **batches)
    ours = sft_steps(text_model, adapter, pairs, tmp_path / "ours", 9)
    # TRL averages the accuracies of micro-batches
    names = ("loss", "grad_norm", "mean_token_accuracy") if accumulation == 1 else ("loss", "grad_norm")
    assert_same(ours, theirs, 9, names)
    assert 0 < ours[-1]["mean_token_accuracy"] < 1


def test_llava_steps_equal_trl(
    tiny_llava: Path, vision_pairs: Callable[..., Path], tiny_models: ModuleType, tmp_path: Path
) -> None:
    adapter = tiny_models.build_adapter(tiny_llava, tmp_path / "adapter", b_std=0.05)
    pairs = vision_pairs(tmp_path / "data", 24, per_prompt=PER_PROMPT, images=(1,))
    theirs = trl_steps(tiny_llava, adapter, pairs, tmp_path / "trl", 6)
    ours = sft_steps(tiny_llava, adapter, pairs, tmp_path / "ours", 6)
    assert_same(ours, theirs, 6, ("loss", "grad_norm", "mean_token_accuracy"))


def test_loss_accuracy_and_entropy_are_those_of_a_plain_forward(
    text_model: Path, adapter: Path, pairs: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    line = sft_steps(text_model, adapter, pairs, tmp_path / "run", 1)[0]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(text_model), adapter)
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    logps, right, entropies = [], [], []
    for text in pairs.read_text().splitlines()[:PER_STEP]:
        row = json.loads(text)
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
        start, ids = (
            tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
            for text in (prompt, whole)
        )
        with torch.no_grad():
            logp_TV = model(ids[None]).logits[0].log_softmax(-1)[len(start) - 1 : -1]
        target_N = ids[len(start) :]
        logps.append(logp_TV.gather(1, target_N[:, None])[:, 0])
        right.append(logp_TV.argmax(-1) == target_N)
        entropies.append(-(logp_TV.exp() * logp_TV).sum(-1))
    assert line["loss"] == pytest.approx(-torch.cat(logps).mean().item(), rel=1e-5)
    assert line["mean_token_accuracy"] == pytest.approx(torch.cat(right).float().mean().item(), rel=1e-6)
    assert line["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-5)
    assert (line["examples"], "pairs" in line, "rewards/margins" in line) == (PER_STEP, False, False)


@pytest.mark.parametrize(
    "other",
    [
        {"share_prefix": False},
        {"tokens_per_pack": 1},
        {"tokens_per_pack": 10_000},
        {"gradient_checkpointing": True},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_how_a_step_is_packed_changes_nothing(
    other: dict[str, Any], text_model: Path, adapter: Path, pairs: Path, tmp_path: Path
) -> None:
    one = sft_steps(text_model, adapter, pairs, tmp_path / "one", 3)
    two = sft_steps(text_model, adapter, pairs, tmp_path / "two", 3, **other)
    assert_same(two, one, 3, ("loss", "grad_norm", "mean_token_accuracy", "entropy"))
    if (
        "tokens_per_pack" in other
    ):  # parts of a prompt's answers need no values of each other, so none runs twice
        assert all(line["tokens"] <= line["tokens_unshared"] for line in two)
    assert one[0]["tokens"] < one[0]["tokens_unshared"] or "share_prefix" in other


def test_prompt_completion_rows_and_pairs_teach_the_same(
    text_model: Path, adapter: Path, pairs: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    learned = tmp_path / "learned.jsonl"
    learned.write_text(
        "".join(json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}) + "\n" for row in rows)
    )
    assert [
        (line["loss"], line["grad_norm"])
        for line in sft_steps(text_model, adapter, learned, tmp_path / "a", 3)
    ] == [
        (line["loss"], line["grad_norm"]) for line in sft_steps(text_model, adapter, pairs, tmp_path / "b", 3)
    ]


@pytest.mark.parametrize("train", [{}, {"share_prefix": False}, {"tokens_per_pack": 1}], ids=str)
def test_a_conversation_teaches_what_its_answers_teach_one_by_one_and_runs_once(
    train: dict[str, Any],
    tiny_llava: Path,
    vision_pairs: Callable[..., Path],
    tiny_models: ModuleType,
    tmp_path: Path,
) -> None:
    pairs = vision_pairs(tmp_path / "data", 3, per_prompt=(1,), images=(1,))
    asked = [json.loads(line) for line in pairs.read_text().splitlines()]
    whole, apart = [], []
    for row in asked:
        turns = [*row["prompt"][-1:], *row["chosen"]]
        turns[0]["content"] = [{"type": "image"}, turns[0]["content"][-1]]
        for number in range(3):
            apart.append({"images": row["images"], "prompt": turns[:-1], "completion": turns[-1:]})
            turns = [
                *turns,
                {"role": "user", "content": [{"type": "text", "text": f"and then? {number}"}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"a bar of {number}"}]},
            ]
        whole.append({"images": row["images"], "messages": turns[:-2]})
    adapter = tiny_models.build_adapter(tiny_llava, tmp_path / "adapter", b_std=0.05)
    found = []
    for name, rows in (("whole", whole), ("apart", apart)):
        path = pairs.with_name(f"{name}.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = train | {"pairs_per_step": len(rows)}
        found.append(sft_steps(tiny_llava, adapter, path, tmp_path / name, 3, **settings))
    assert_same(*found, 3, ("loss", "grad_norm", "mean_token_accuracy", "entropy"))
    for one, three in zip(*found, strict=True):
        assert one["tokens_answers"] == three["tokens_answers"] == round(3 * one["lengths/chosen"])
        assert 2 * one["tokens"] < three["tokens"]


def test_an_answer_given_twice_weighs_twice_and_runs_once(
    text_model: Path, adapter: Path, tmp_path: Path
) -> None:
    def run(name: str, *answers: str) -> dict[str, Any]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps({"prompt": "Why?", "completion": answer}) + "\n" for answer in answers)
        )
        return sft_steps(text_model, adapter, path, tmp_path / name, 1, pairs_per_step=len(answers))[0]

    one, other, both = run("one", "so be it"), run("other", "no"), run("both", "so be it", "no", "so be it")
    lengths = {name: line["tokens"] - one["tokens"] for name, line in (("other", other), ("both", both))}
    assert lengths["both"] < other["tokens"]  # the prompt and the doubled answer ran once
    n, m = (len(_answer_ids(text_model, text)) for text in ("so be it", "no"))
    assert both["loss"] == pytest.approx((2 * n * one["loss"] + m * other["loss"]) / (2 * n + m), rel=1e-5)


def _answer_ids(model: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    turns = [{"role": "user", "content": "Why?"}]
    before = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": text}], tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    return list(ids[len(tokenizer(before, add_special_tokens=False).input_ids) :])


def test_a_resumed_run_has_the_numbers_of_an_undisturbed_one(
    text_model: Path, adapter: Path, pairs: Path, tmp_path: Path
) -> None:
    whole = sft_steps(text_model, adapter, pairs, tmp_path / "whole", 5)
    sft_steps(text_model, adapter, pairs, tmp_path / "parts", 2)
    parts = sft_steps(text_model, adapter, pairs, tmp_path / "parts", 5, resume=True)
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]


def test_no_reference_is_computed_or_kept(
    text_model: Path, adapter: Path, pairs: Path, tmp_path: Path, fresh_cache: Path
) -> None:
    sft_steps(text_model, adapter, pairs, tmp_path / "run", 1)
    assert not (fresh_cache / "reference").exists()
    facts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (facts["method"], "reference_cache" in facts) == ("sft", False)
    assert "supervised fine-tuning" in (tmp_path / "run" / "final" / "README.md").read_text()


def test_evaluation_reports_the_same_figures(
    text_model: Path, adapter: Path, pairs: Path, tmp_path: Path
) -> None:
    recipe = {
        "model": {"name": str(text_model)},
        "lora": {"init_from": str(adapter)},
        "data": {"train": str(pairs), "eval": str(pairs), "workers": 0},
        "train": {"output": str(tmp_path / "run"), "learning_rate": 0.0, "pairs_per_step": 24, "epochs": 1},
        "track": [],
    }
    (line,) = train_sft(config_from_dict(recipe)).metrics
    for name in ("loss", "mean_token_accuracy", "entropy"):
        assert line[f"eval_{name}"] == pytest.approx(line[name], rel=1e-5)


def test_what_does_not_belong_to_sft_is_named(text_model: Path, pairs: Path, tmp_path: Path) -> None:
    def recipe(**changes: Any) -> Any:
        base = {"model": {"name": str(text_model)}, "data": {"train": str(pairs), "workers": 0}, "track": []}
        return config_from_dict(base | {"train": {"output": str(tmp_path / "run"), "max_steps": 1}} | changes)

    with pytest.raises(UserError, match=r"loss\.beta: wanted nothing with fasttrain sft.* got 0\.3"):
        train_sft(recipe(loss={"beta": 0.3}))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "Why?", "completion": "so"}\n{"prompt": "Why?", "label": true}\n')
    with pytest.raises(
        UserError, match=r"bad\.jsonl line 2: completion: wanted an answer to learn .* got nothing"
    ):
        train_sft(recipe(data={"train": str(bad)}))
    with pytest.raises(UserError, match=r"bad\.jsonl line 1: chosen: wanted a pair, got one answer to learn"):
        train_dpo(recipe(data={"train": str(bad)}))
    train_sft(recipe())
    with pytest.raises(UserError, match="is a run of fasttrain sft, not of fasttrain dpo"):
        train_dpo(recipe(), resume=True)
