"""Our attention as one of Hugging Face's: the layout of the pack travels as a keyword through the model's forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface

from fasttrain.errors import UserError
from fasttrain.model.lora import language_model
from fasttrain.model.positions import scales_by_longest
from fasttrain_kernels import (
    AttentionCase,
    SharedPrefixLayout,
    choose_attention,
    shared_prefix_attention,
    why_not_attention,
)

SHARED = "fasttrain_shared_prefix"

# Keywords some families pass to their attention that change its result and that ours does not compute.
_UNKNOWN_TO_US = ("sinks", "position_bias", "alibi")


# Text parts of families whose image tokens see each other, which only transformers' own masks do (Gemma 3 and PaliGemma:
# `families.py`; Gemma 4 says so in its configuration).
_SEE_IMAGES_BOTH_WAYS = ("molmo2_text",)


class CannotShare(RuntimeError):
    """A layer asks for attention that shared-prefix attention does not compute."""


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, shared_prefix_layout: SharedPrefixLayout | None = None,
    shared_prefix_backend: str | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Hugging Face's attention signature: q (1, H, T, K), k and v (1, Hkv, T, K) -> (1, T, H, K)."""
    if shared_prefix_layout is None:
        raise CannotShare(f"{type(module).__name__} is not told which tokens belong together")
    unknown = [name for name in _UNKNOWN_TO_US if kwargs.get(name) is not None]
    if unknown or attention_mask is not None or (dropout and module.training):
        raise CannotShare(
            f"{type(module).__name__} asks for attention with {', '.join(unknown) or 'a mask or dropout'}"
        )
    keys, values = query.shape[-1], value.shape[-1]
    if keys != values:  # multi-head latent attention: zeros add nothing to a score or to an output
        query, key, value = (
            pad(part, (0, max(keys, values) - part.shape[-1])) for part in (query, key, value)
        )
    out = shared_prefix_attention(
        query, key, value, shared_prefix_layout, scale=keys**-0.5 if scaling is None else scaling,
        backend=shared_prefix_backend, window=sliding_window, softcap=softcap, sinks=s_aux,
    )  # fmt: skip
    return out[..., :values].transpose(1, 2), None


AttentionInterface.register(SHARED, _attention)


def check_attention(
    wanted: str, config: Any, device: torch.device, dtype: torch.dtype, bidirectional: bool = False,
    elsewhere: bool = False,
) -> None:  # fmt: skip
    """UserError if the backend that a recipe asks for cannot run a model of this configuration there.

    elsewhere: the device is another machine's.
    """
    for size in [] if wanted == "auto" else _head_sizes(config):
        case = AttentionCase(device, dtype, size, bidirectional, softcap=_softcap(config))
        reason = why_not_attention(wanted, case, elsewhere)
        if reason:
            raise UserError(f"model.attention: wanted a backend that can run here, got {wanted}: {reason}")


def attention_facts(policy: Any) -> dict[str, str]:
    """The backend that this policy's passes use, and why: for environment.json."""
    if not policy.shared:
        reason = "completions run as ordinary sequences"
        return {"attention_backend": policy.ordinary_attention, "attention_reason": reason}
    if policy.attention != "auto":
        return {"attention_backend": policy.attention, "attention_reason": "model.attention"}
    config = policy.model.config
    case = AttentionCase(
        policy.device, policy.model.dtype, max(_head_sizes(config)), softcap=_softcap(config)
    )
    backend, reason = choose_attention(case)
    return {"attention_backend": backend, "attention_reason": reason}


def _softcap(config: Any) -> bool:
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def _head_sizes(config: Any) -> list[int]:
    """Head sizes of a model's attention layers; more than one where some layers are global."""
    text = config.get_text_config()
    usual = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if getattr(text, "qk_rope_head_dim", None):  # multi-head latent attention
        usual = max(text.qk_rope_head_dim + (text.qk_nope_head_dim or 0), text.v_head_dim or 0)
    return sorted({usual, getattr(text, "global_head_dim", None) or usual})


def why_unshared(model: Any, longest: int) -> str | None:
    """Why this model's layers cannot share a prefix over sequences of `longest` tokens; None if they can."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    other = kinds - {"full_attention", "attention", "sliding_attention"}
    if other:
        return f"it has layers of type {', '.join(sorted(other))}"
    if getattr(config, "cross_attention_layers", None):
        return "it sees images through cross-attention layers"
    # Janus and DeepSeek-VL hand everything on to a decoder that takes them, and do not say so of themselves
    takes = "_supports_attention_backend"
    if not (getattr(model, takes, False) or getattr(language_model(model), takes, False)):
        return f"{type(model).__name__} does not take attention functions"
    if (
        getattr(config, "use_bidirectional_attention", None) == "vision"
        or config.model_type in _SEE_IMAGES_BOTH_WAYS
    ):
        return "an image's tokens see each other in it"
    if scales_by_longest(config, longest):
        return "its longrope position scaling depends on the longest sequence of a pass"
    if getattr(config, "alibi", False):
        return "it uses ALiBi position biases"
    return None
