"""Which failures of a pass over images are told as the model's."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch

from fasttrain.errors import UserError
from fasttrain.model.image_mistakes import image_mistakes


def failing(module: str) -> Callable[[], None]:
    """A function of a module of this name in which torch fails."""
    found = types.ModuleType(module)
    exec("import torch\ndef run(): torch.ones(2) @ torch.ones(3)", vars(found))
    run: Callable[[], None] = found.run
    return run


@pytest.mark.parametrize(
    ("module", "images", "passed", "told"),
    [
        ("transformers.models.llava", 1, False, True),
        ("a_models_own_code", 1, False, True),
        ("transformers.models.llava", 0, False, False),  # text is tried before
        ("transformers.models.llava", 1, True, False),
        ("fasttrain_kernels.shared_prefix", 1, False, False),
        ("fasttrain.model.fused_lora", 1, False, False),
    ],
)
def test_what_the_models_code_raises_over_its_first_images_is_told(
    module: str, images: int, passed: bool, told: bool
) -> None:
    with (
        pytest.raises(UserError if told else RuntimeError, match="inconsistent"),
        image_mistakes(torch.nn.Linear(1, 1), torch.zeros(3), images, passed),
    ):
        failing(module)()
