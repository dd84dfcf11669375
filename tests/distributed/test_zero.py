"""What ZeRO keeps of a run's memory and sends, and which models and adapters it refuses."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fasttrain.ranks import full_shape, ranks
from fasttrain.train.loop import train_dpo

pytestmark = pytest.mark.forks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "words"),
    [
        # ranks with other numbers of images gathered its weights another number of times, and hung
        ("PaddleOCR-VL", ["wanted 2 for PaddleOCRVL", "projector.pre_norm runs once for every image"]),
        # ranks whose prompts have no image did not gather them at all
        ("Ernie 4.5 VL", ["for Ernie4_5_VL", "whose experts for images run in passes with images only"]),
    ],
)
def test_layers_that_only_some_ranks_run_are_refused_under_zero_3(
    family: str,
    words: list[str],
    tiny_models: ModuleType,
    tiny_families: ModuleType,
    recipes: Callable[..., Any],
    run_ranks: Callable[..., Any],
    tmp_path: Path,
) -> None:
    name = f"model.name={tiny_families.save(tiny_models, tmp_path / 'model', family)}"
    ended = run_ranks(lambda: train_dpo(recipes("images", "zero", name, "distributed.zero_stage=3")))
    assert all(word in ended.stderr for word in ["distributed.zero_stage: wanted ", *words])


def test_a_finished_run_under_zero_holds_no_memory(
    recipes: Callable[..., Any], run_ranks: Callable[..., Any]
) -> None:
    """DeepSpeed's hooks on weights keep an engine, its model and buffers, where Python finds no ring."""
    config = recipes("text", "zero", "train.max_steps=2", "distributed.zero_stage=2", "data.eval=null")

    def body() -> None:
        from fasttrain.model.policy import Policy

        train_dpo(config)
        gc.collect()
        assert not any(type(found) is Policy for found in gc.get_objects())

    ended = run_ranks(body)
    assert ended.codes == [0, 0], ended.stderr


@pytest.mark.parametrize(
    ("stage", "zero", "held"),
    [("2", {}, None), ("3", {}, None), ("3", {"reduce_bucket_size": 99_999}, 99_999)],
)
def test_deepspeed_lays_out_room_for_the_gradients_that_there_are(
    recipes: Callable[..., Any], run_ranks: Callable[..., Any], deepspeed_config: Callable[..., str], tmp_path: Path,
    stage: str, zero: dict[str, int], held: int | None,
) -> None:  # fmt: skip
    """Its own buckets are of 2 GB each in fp32; what the recipe's file says stands."""
    changes = [
        "train.max_steps=1",
        "data.eval=null",
        f"distributed.zero_stage={stage}",
        deepspeed_config(**zero),
    ]
    config = recipes("text", "zero", *changes)

    def body() -> None:
        from fasttrain.train.zero_engine import ZeroEngine

        backward = ZeroEngine.backward

        def told(engine: Any, loss: torch.Tensor) -> None:
            backward(engine, loss)
            trained = sum(full_shape(p).numel() for p in engine.policy.parameters() if p.requires_grad)
            seen = {"trained": trained, "bucket": engine.engine.optimizer.reduce_bucket_size}
            (tmp_path / f"seen{ranks().rank}.json").write_text(json.dumps(seen))

        ZeroEngine.backward = told
        train_dpo(config)

    ended = run_ranks(body)
    assert ended.codes == [0, 0], ended.stderr
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen{rank}.json").read_text())
        assert seen["bucket"] == (held or seen["trained"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "holds weights of the embedding or the head"),
        ({"use_dora": True}, "has use_dora, for which peft reads whole weights"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights pissa, for which"),
        ({"trainable_token_indices": [3]}, "has trainable_token_indices, for which"),
    ],
    ids=str,
)
def test_an_adapter_that_needs_whole_weights_is_refused_under_zero_3(
    recipes: Callable[..., Any], run_ranks: Callable[..., Any], tiny_text: Path, tmp_path: Path, options: dict[str, Any], words: str,
) -> None:  # fmt: skip
    import peft
    from transformers import AutoModelForCausalLM

    about = peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_text), about)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    changes = ["lora={}", f"lora.init_from={tmp_path / 'adapter'}", "distributed.zero_stage=3"]
    ended = run_ranks(lambda: train_dpo(recipes("text", "zero", *changes)))
    assert f"adapter {words}" in ended.stderr


@pytest.mark.slow
def test_zero_3_gathers_a_frozen_head_once_a_pass_and_never_in_the_backward(
    recipes: Callable[..., Any],
    run_ranks: Callable[..., Any],
    deepspeed_config: Callable[..., str],
    tmp_path: Path,
) -> None:
    """Counted where it is sent: all-gathers of the head's size. The embeddings have the same one, and are frozen too."""
    # the cache is full: from here on passes are steps
    train_dpo(recipes("images", "one", "train.max_steps=1", "data.eval=null"))
    config = recipes(
        "images", "two", "train.max_steps=2", "data.eval=null", "distributed.zero_stage=3",
        deepspeed_config(stage3_param_persistence_threshold=0, stage3_prefetch_bucket_size=0),
    )  # fmt: skip

    def body() -> None:
        from fasttrain.model.head import LogprobHead
        from fasttrain.train.zero_engine import ZeroEngine

        gather, seen, size = torch.distributed.all_gather_into_tensor, [], []

        def counted(*arguments: Any, **options: Any) -> Any:
            output = options["output_tensor"] if "output_tensor" in options else arguments[0]
            if size and output.numel() == size[0]:
                seen.append("gathered")
            return gather(*arguments, **options)

        def told(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(engine: Any, *arguments: Any, **options: Any) -> Any:
                if not size:  # before it the head was compared with the model's own logits
                    head = next(m for m in engine.policy.modules() if isinstance(m, LogprobHead))
                    size.append(head.weight.ds_numel)
                seen.append(name)
                return call(engine, *arguments, **options)

            return wrapped

        torch.distributed.all_gather_into_tensor = counted
        ZeroEngine.forward = told("pass", ZeroEngine.forward)
        ZeroEngine.backward = told("backward", ZeroEngine.backward)
        train_dpo(config)
        (tmp_path / f"seen{ranks().rank}.json").write_text(json.dumps(seen))

    ended = run_ranks(body)
    assert ended.codes == [0, 0], ended.stderr
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen{rank}.json").read_text())
        passes = " ".join(seen).split("pass")[1:]
        assert len(passes) >= 4 and sum("backward" in held for held in passes) >= 4
        for held in passes:  # embeddings and head; a split group's packs pass twice, of which one goes back
            assert held.split() in (["gathered"] * 2, ["gathered"] * 2 + ["backward"]), held
