"""A training pass of the real model on the meta device: every tensor has its size, nothing is computed, bytes are counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttrain.errors import UserError
from fasttrain.model.last_layer import trimmed_mlp
from fasttrain.model.lora import language_model
from fasttrain.plan.stand_ins import PLANNED, planned_head
from fasttrain.plan.tracker import LiveBytes, unique_parameters
from fasttrain_kernels import SharedPrefixLayout


@dataclass(frozen=True, kw_only=True)
class PassBytes:
    """Bytes above weights and training state. `kept`: what the forward leaves for the backward; `peak`: the most at any time.

    `images`: the most while the vision tower runs.
    """

    kept: int
    peak: int
    images: int


@dataclass(frozen=True)
class PassSize:
    """A pack: tokens of the decoder, of which `rows` predict, and images; of shared prompts or of ordinary sequences."""

    tokens: int
    rows: int
    images: int = 0
    shared: bool = True


def count_pass(
    model: Any, size: PassSize, *, device: torch.device, keep_gradients: bool, tower: bool = True
) -> PassBytes:
    """Forward and backward of one pack on a model made of meta tensors, as `device` would run it.

    `keep_gradients`: parameters' gradients pile up until the pass is over (plain torch); else each is gone as soon as it is made
    (ZeRO), and the caller adds its buckets.
    """
    if _recurrent(model.config.get_text_config()):
        raise CannotCount(
            f"{type(model).__name__} has recurrent layers, whose plain code runs token by token"
        )
    parameters = unique_parameters(model)
    hooks = []
    if not keep_gradients:
        hooks = [p.register_post_accumulate_grad_hook(_drop) for p in parameters if p.requires_grad]
    try:
        with _no_autocast_on_meta(), LiveBytes() as live:
            live.add(parameters)
            live.add(model.buffers())
            live.add(p.grad for p in parameters if p.grad is not None)
            before = live.peak = live.now
            logp_N, images = _forward(model, size, device, live, tower)
            kept = live.now - before
            logp_N.sum().backward()
            del logp_N
            return PassBytes(kept=kept, peak=live.peak - before, images=images)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        problem = " ".join(str(error).split())[:160]
        raise CannotCount(f"{type(model).__name__} does not run without data ({problem})") from None
    finally:
        for hook in hooks:
            hook.remove()


class CannotCount(UserError):
    """A model whose pass needs real values; its memory cannot be predicted."""


def _recurrent(config: Any) -> bool:
    """Whether layers scan their tokens: on tensors without values that takes a minute and more for a pack."""
    kinds = set(getattr(config, "layer_types", None) or [])
    return bool(kinds & {"linear_attention", "mamba", "recurrent", "hybrid"})


@contextlib.contextmanager
def _no_autocast_on_meta() -> Iterator[None]:
    """Let torch.autocast be asked about the meta device, as peft's adapters of experts do; torch has none for it."""
    real = torch.autocast

    def autocast(device_type: str, *args: Any, **settings: Any) -> Any:
        known = device_type != "meta"
        return real(device_type, *args, **settings) if known else contextlib.nullcontext()

    torch.autocast = autocast  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = real  # type: ignore[misc]


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _forward(
    model: Any, size: PassSize, device: torch.device, live: LiveBytes, tower: bool
) -> tuple[Tensor, int]:
    """Log-probs (N,) and the most bytes alive while images were encoded."""
    ids_T = torch.empty(1, size.tokens, dtype=torch.int64, device="meta")
    images, outputs = 0, None
    inputs: dict[str, Any] = {"input_ids": ids_T}
    if size.images and tower:
        embedded_TD = model.get_input_embeddings()(ids_T)
        start = live.now
        outputs = image_features(
            model, size.images
        )  # alive until the decoder is done, as transformers keeps it
        features = torch.cat(list(outputs.pooler_output)).to(embedded_TD.dtype)
        mask_T1 = torch.empty_like(ids_T, dtype=torch.bool)[..., None]
        inputs = {"inputs_embeds": embedded_TD.masked_scatter(mask_T1, features)}
        images = live.peak - start
        del embedded_TD, mask_T1
    positions = torch.empty(1, size.tokens, dtype=torch.int64, device="meta")
    decoder = language_model(model)
    if size.shared and trimmed_mlp(decoder) is not None:  # its last layer is told which rows predict
        inputs["shared_prefix_layout"] = SharedPrefixLayout.from_groups(
            [(size.tokens - size.rows, [size.rows])]
        )
    out = decoder(**inputs, position_ids=positions, use_cache=False, return_dict=True)
    hidden_TD = out.last_hidden_state[0]
    del out, outputs, inputs, positions
    rows_N = torch.empty(size.rows, dtype=torch.int64, device="meta")
    head = model.get_output_embeddings()
    return planned_head(hidden_TD.index_select(0, rows_N), head.weight, device), images


def image_features(model: Any, images: int) -> Any:
    """The tower's and projector's outputs for so many images of the model's size."""
    side = model.config.vision_config.image_size
    channels = getattr(model.config.vision_config, "num_channels", 3)
    pixels = torch.empty(images, channels, side, side, dtype=model.dtype, device="meta")
    return model.base_model.get_image_features(pixel_values=pixels, return_dict=True)


def use_planned_attention(model: Any) -> None:
    """Let every part of the model that takes attention functions use one that only has a size."""
    parts = {"text_config": PLANNED} if hasattr(model.config, "text_config") else PLANNED
    if getattr(model, "_supports_attention_backend", False):
        model.set_attn_implementation(parts)
