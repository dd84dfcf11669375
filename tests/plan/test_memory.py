"""Predicted bytes are those that the allocator really hands out in training on the CPU."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fasttrain.config import config_from_dict
from fasttrain.model.flops import measure_shape
from fasttrain.model.load import load_model
from fasttrain.plan.allocated import peak_allocated
from fasttrain.plan.choose import (
    choose_checkpointing,
    choose_filling,
    choose_tokens,
    largest_pack,
    most_without_gradients,
)
from fasttrain.plan.histogram import GroupShape, Histogram
from fasttrain.plan.memory import Activations, PackMix, plan_memory
from fasttrain.plan.planned_model import NF4_BYTES, build_planned_model, count_weights
from fasttrain.plan.tracker import LiveBytes, tensor_bytes

CPU = torch.device("cpu")
LORA = {"rank": 4, "alpha": 8}


def recipe(lora: Any, projector: bool = False, **train: Any) -> Any:
    model = {"name": "unused", "train_projector": projector}
    return config_from_dict({"model": model, "lora": lora, "data": {"train": "unused"}, "train": train})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "lora", "projector", "groups", "images"),
    [
        ("llama", LORA, False, 6, 0),
        ("wide", {**LORA, "dropout": 0.1}, False, 4, 0),
        ("large", LORA, False, 3, 0),
        ("large", None, False, 3, 0),
        ("llava", LORA, True, 5, 5),
        ("llava", None, True, 5, 5),
        ("mixtral", LORA, False, 6, 0),
        ("mixtral", None, False, 6, 0),
        ("qwen3_moe", {**LORA, "targets": ["q_proj", "mlp.experts.gate_up_proj"]}, False, 6, 0),
    ],
)
def test_the_predicted_peak_of_a_run_is_the_allocated_one(
    name: str, lora: Any, projector: bool, groups: int, images: int, checkpointing: bool, configs: Any,
    real_pass: Callable[..., Any],
) -> None:  # fmt: skip
    layout = [(61, [23, 17])] * groups
    made = real_pass(
        configs[name],
        lora=lora,
        projector=projector,
        checkpointing=checkpointing,
        layout=layout,
        images=images,
    )
    measured, state = _measured(made)

    config = recipe(lora, projector)
    planned = build_planned_model(config, configs[name], torch.float32)
    mix = PackMix(101, 40, images / groups, tower=bool(images))
    activations = Activations(planned, mix, CPU, sharded=False)
    for counted in (True, False):
        predicted = plan_memory(
            config, planned, activations, 101 * groups, checkpointing, stage=None, ranks=1, device=CPU, counted=counted
        )  # fmt: skip
        assert predicted.peak == pytest.approx(measured, rel=0.05)
        assert not counted or len(activations._counted) == 1
    assert predicted.gradients + predicted.moments == pytest.approx(state, rel=0.01)


def _measured(made: Any) -> tuple[int, int]:
    """The allocator's peak of a pass with all that is held meanwhile, and what of that is gradients, masters and moments."""
    for _ in range(2):  # moments exist after the first step, gradients pile up from the first pack
        made.run()
        made.engine.step(1.0)
    made.run()
    parameters = list(made.model.parameters())
    optimizer = made.engine.optimizer.optimizer
    moments = [value for state in optimizer.state.values() for value in state.values()]
    masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in [*parameters, *masters] if parameter.grad is not None]
    wide = [] if parameters[-1].dtype == torch.float32 else masters
    held = tensor_bytes([*parameters, *gradients, *moments, *wide])
    return held + peak_allocated(made.run), tensor_bytes([*gradients, *moments, *wide])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_predicted_peak_with_an_adapter_on_16_and_4_bit_weights_is_the_allocated_one(
    dtype: str,
    quantize: str | None,
    checkpointing: bool,
    configs: Any,
    real_pass: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """peft's layers over bitsandbytes' keep more than ours; an adapter is of the model's type."""
    if quantize:
        pytest.importorskip("bitsandbytes")
    AutoModelForCausalLM.from_config(configs["large"]).save_pretrained(tmp_path)
    model = {"name": str(tmp_path), "dtype": dtype, "quantize": quantize}
    config = config_from_dict({"model": model, "lora": LORA, "data": {"train": "unused"}})
    loaded = load_model(tmp_path, config.model, copy.deepcopy(configs["large"]), CPU)
    layout = [(61, [23, 17])] * 5
    made = real_pass(configs["large"], lora=LORA, checkpointing=checkpointing, layout=layout, model=loaded)
    measured, _ = _measured(made)
    planned = build_planned_model(config, configs["large"], loaded.dtype)
    activations = Activations(planned, PackMix(101, 40, 0, tower=False), CPU, sharded=False)
    predicted = plan_memory(config, planned, activations, 505, checkpointing, stage=None, ranks=1, device=CPU)
    assert 0.97 * measured < predicted.peak < 1.09 * measured
    assert planned.shape == measure_shape(made.model)


@pytest.mark.parametrize("name", ["llama", "qwen2", "wide", "large", "llava"])
@pytest.mark.parametrize("lora", [LORA, None])
def test_predicted_parameters_are_the_models_own(
    name: str, lora: Any, configs: Any, real_pass: Callable[..., Any]
) -> None:
    projector = name == "llava"
    made = real_pass(configs[name], lora=lora, projector=projector, layout=[(5, [2])])
    planned = build_planned_model(recipe(lora, projector), copy.deepcopy(configs[name]), torch.float32)
    real = count_weights(made.model, None)
    assert planned.weights == real
    assert real.trained == sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    assert real.total == sum(p.numel() for p in set(made.model.parameters()))
    assert planned.shape == measure_shape(made.model)


def test_a_projector_that_trains_is_planned_beside_itself_unquantised(configs: Any) -> None:
    """peft keeps the frozen one beside its copy."""
    counted = {}
    for projector in (False, True):
        made = recipe(LORA, projector)
        made = dataclasses.replace(made, model=dataclasses.replace(made.model, quantize="nf4"))
        counted[projector] = build_planned_model(made, configs["llava"], torch.float32).weights
    biases = 2 * configs["llava"].text_config.hidden_size
    more = (counted[True].projector - biases) * (4 - NF4_BYTES)
    assert counted[True].frozen_bytes - counted[False].frozen_bytes == pytest.approx(more, abs=2)


def llava_parameters(hidden: int, inner: int, layers: int) -> int:
    """By hand: embeddings and head, layers of four attention and three MLP matrices and two norms, CLIP ViT-L/14-336, projector."""
    clip = 303_507_456
    layer = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    projector = 1024 * hidden + hidden + hidden * hidden + hidden
    return 2 * 32064 * hidden + layers * layer + hidden + clip + projector


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("llava-hf/llava-1.5-7b-hf", llava_parameters(4096, 11008, 32)),
        ("llava-hf/llava-1.5-13b-hf", llava_parameters(5120, 13824, 40)),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),  # as the hub shows it
    ],
)
def test_the_published_sizes_give_the_published_number_of_parameters(name: str, total: int) -> None:
    from fasttrain.plan.known_models import known_config

    config = known_config(name)
    planned = build_planned_model(recipe(None), config, torch.bfloat16)
    assert planned.weights.total == total


def test_live_bytes_count_a_storage_once_and_until_it_is_gone() -> None:
    with LiveBytes() as live:
        a = torch.empty(10, 10)
        view = a[2:].reshape(-1)
        assert live.now == 400
        b = a * 2
        del a
        assert live.now == 800  # the view keeps the first
        del view, b
        assert live.now == 0 and live.peak == 800


def test_zero_stages_split_state_and_weights_over_the_ranks(configs: Any) -> None:
    config = recipe(LORA)
    planned = build_planned_model(config, configs["large"], torch.bfloat16)
    activations = Activations(planned, PackMix(101, 40, 0, False), torch.device("cuda"), sharded=True)

    def plan(stage: int | None, ranks: int) -> Any:
        return plan_memory(
            config, planned, activations, 1000, False, stage=stage, ranks=ranks, device=torch.device("cuda")
        )

    one, two, three = plan(None, 4), plan(2, 4), plan(3, 4)
    for part in ("gradients", "masters", "moments"):
        assert getattr(two, part) == getattr(three, part) == getattr(one, part) // 4
    assert one.weights == two.weights and three.weights == one.weights // 4
    assert three.gathered > 0 == two.gathered
    assert one.activations == two.activations == three.activations > 0
    assert plan(3, 8).peak < three.peak


def test_auto_checkpoints_only_when_a_pack_worth_running_does_not_fit() -> None:
    auto, fixed = recipe(LORA), recipe(LORA, tokens_per_pack=700, gradient_checkpointing=False)
    assert choose_checkpointing(auto, 900, CPU, lambda tokens, on: on or tokens <= 900) is False
    assert choose_checkpointing(auto, 901, CPU, lambda tokens, on: on or tokens <= 900) is True
    assert choose_checkpointing(fixed, 900, CPU, lambda tokens, on: on) is False
    assert choose_tokens(fixed, 900, CPU, lambda tokens: False) == 700
    large = recipe(
        LORA, tokens_per_pack=10**6, pairs_per_step=4
    )  # a step of four groups is all that a pack can hold
    assert choose_checkpointing(large, 900, CPU, lambda tokens, on: on or tokens <= 3600) is False
    assert choose_checkpointing(large, 901, CPU, lambda tokens, on: on or tokens <= 3600) is True
    assert choose_tokens(auto, 900, CPU, lambda tokens: True) == 2048
    assert 900 < choose_tokens(auto, 900, CPU, lambda tokens: tokens <= 1030) <= 1030


def test_packs_without_gradients_are_no_larger_than_training_or_speed_asks_for() -> None:
    """A step limits neither references nor evaluations: packs of 10^8 tokens would be all of their data at once."""
    config = recipe(LORA, tokens_per_pack=10**8, pairs_per_step=4)
    assert most_without_gradients(config, 10**8, 900) == 16384
    assert most_without_gradients(config, 10**8, 9000) == 36000
    assert most_without_gradients(config, 700, 9000) == 700


def test_auto_splits_no_group_that_fits() -> None:
    """Its parts would run its prompt again."""
    auto = recipe(LORA)
    assert choose_tokens(auto, 5000, CPU, lambda tokens: True) == 5120
    assert choose_tokens(auto, 10**6, CPU, lambda tokens: True) == 16384
    assert 2900 < choose_tokens(auto, 5000, CPU, lambda tokens: tokens <= 3100) <= 3100


def test_auto_puts_groups_together_up_to_less_on_a_cpu_than_a_pack_may_have() -> None:
    auto, fixed = recipe(LORA), recipe(LORA, tokens_per_pack=4096)
    assert choose_filling(auto, 5120, CPU) == 1024
    assert choose_filling(auto, 300, CPU) == 300
    assert choose_filling(fixed, 4096, CPU) == 4096
    assert choose_filling(auto, 16384, torch.device("cuda")) == 16384


@pytest.mark.parametrize("room", [0, 255, 256, 5000, 1 << 19])
def test_the_largest_pack_is_found_to_256_tokens(room: int) -> None:
    assert largest_pack(lambda tokens: tokens <= room) == room // 256 * 256


def test_a_histogram_is_the_groups_it_counts() -> None:
    data = Histogram([GroupShape(10, (3, 4), ((0, 1),), 1, 2), GroupShape(20, (5,), (), 0, 1)], "here")
    assert [data.lengths(n).tolist() for n in range(len(data))] == [[10, 3, 4], [10, 3, 4], [20, 5]]
    assert (data.tokens, data.rows, data.images, data.pair_total, data.longest(True)) == (59, 19, 2, 2, 25)
    assert data.longest_sequence == 25
    assert Histogram([GroupShape(10, (3, 4), ((0, 1),), 1)], "here").longest_sequence == 14
