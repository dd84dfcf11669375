"""The operations that tflops, mfu and `fasttrain plan` report are those that torch counts while a pass really runs."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from fasttrain.model.flops import measure_shape, pass_flops

LORA = {"rank": 4, "alpha": 8}


def _pairs(q: Any, k: Any, causal: bool) -> int:
    batch, heads, rows, size = q
    return batch * heads * size * (rows * (rows + 1) // 2 if causal else rows * k[2])


def _flash(q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    return 4 * _pairs(q, k, causal)


def _flash_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dropout: float, causal: bool, **_: Any
) -> int:
    return 10 * _pairs(q, k, causal)


def _addmm_(out: Any, a: Any, b: Any, **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


# What FlopCounterMode leaves out or counts whole: in-place products, the invisible half of causal attention.
MAPPING = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
    torch.ops.aten.addmm_: _addmm_,
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "lora", "projector", "images"),
    [
        ("llama", LORA, False, 0),
        ("llama", {**LORA, "dropout": 0.1}, False, 0),
        ("llama", None, False, 0),
        ("llama", {**LORA, "targets": ["q_proj", "down_proj"]}, False, 0),
        ("llama", {**LORA, "targets": ["v_proj", "up_proj"]}, False, 0),
        ("qwen2", LORA, False, 0),
        ("qwen2", None, False, 0),
        ("llava", LORA, False, 2),
        ("llava", LORA, True, 2),
        ("llava", LORA, True, 0),
        ("llava", None, True, 1),
        ("llava", None, False, 1),
    ],
)
def test_predicted_operations_are_the_counted_ones(
    name: str, lora: Any, projector: bool, images: int, checkpointing: bool, configs: Any, real_pass: Callable[..., Any]
) -> None:  # fmt: skip
    layout = [(41, [13, 7, 9]), (33, [5])]
    made = real_pass(
        configs[name],
        lora=lora,
        projector=projector,
        checkpointing=checkpointing,
        layout=layout,
        images=images,
    )
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        made.run()
    predicted = pass_flops(
        measure_shape(made.model), layout, images, backward=True, checkpointing=checkpointing
    )
    assert predicted == counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ordinary_passes_run_every_row_of_the_last_layer(
    checkpointing: bool, configs: Any, real_pass: Callable[..., Any]
) -> None:
    layout = [(41, [13]), (33, [5])]
    made = real_pass(configs["llama"], lora=LORA, checkpointing=checkpointing, layout=layout, shared=False)
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        made.run()
    predicted = pass_flops(
        measure_shape(made.model), layout, 0, backward=True, checkpointing=checkpointing, shared=False
    )
    assert predicted == counter.get_total_flops()


@pytest.mark.parametrize("family", ["LLaVA-NeXT", "LLaVA-OneVision", "Gemma 3", "Pixtral", "Aya Vision"])
def test_no_work_is_made_up_for_towers_that_see_tiles_any_size_or_pool(
    family: str, tiny_families: ModuleType, tiny_models: ModuleType
) -> None:
    config, _ = tiny_families.FAMILIES[family](tiny_models)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    shape = measure_shape(model)
    assert (shape.vision_per_image, shape.projector_backward_per_image) == (0, 0)


def test_checkpointing_leaves_the_frozen_vision_tower_out_of_the_backward(
    configs: Any, real_pass: Callable[..., Any]
) -> None:
    made = real_pass(
        configs["llava"], lora=LORA, projector=True, checkpointing=True, layout=[(41, [13])], images=2
    )
    seen: list[Any] = []
    made.model.base_model.vision_tower.register_forward_hook(lambda module, args, out: seen.append(out))
    made.run()
    assert seen and not seen[0].last_hidden_state.requires_grad
