"""Drop-in kernels for preference training: torch and triton only, nothing else is imported."""

from .backends import backend_for
from .fused_linear_preference import FusedLinearPreferenceLoss
from .label_logprob import label_logprob, label_logprob_ref
from .layer_passes import geglu, geglu_ref, rms_norm, rms_norm_ref, rotary, rotary_ref, swiglu, swiglu_ref
from .linear_logprob import (
    LinearLogprob,
    linear_logprob,
    linear_logprob_and_unit,
    linear_logprob_ref,
    with_unit_gradient,
)
from .preference_kinds import COUPLE_PAIRS, F_DIVERGENCES, KINDS, REFERENCE_FREE, TAKE_F_DIVERGENCE
from .preference_loss import PreferenceLoss, preference_loss, preference_loss_ref
from .sequence_logprob import pair_sums, preference_logps, sequence_sums, wpo_weights
from .shared_prefix import SharedPrefixLayout
from .shared_prefix_attention import shared_prefix_attention, shared_prefix_attention_ref
from .shared_prefix_backends import (
    ATTENTION_BACKENDS,
    AttentionCase,
    attention_backend_for,
    choose_attention,
    why_not_attention,
)

__all__ = [
    "ATTENTION_BACKENDS",
    "COUPLE_PAIRS",
    "F_DIVERGENCES",
    "KINDS",
    "REFERENCE_FREE",
    "TAKE_F_DIVERGENCE",
    "AttentionCase",
    "FusedLinearPreferenceLoss",
    "LinearLogprob",
    "PreferenceLoss",
    "SharedPrefixLayout",
    "attention_backend_for",
    "backend_for",
    "choose_attention",
    "geglu",
    "geglu_ref",
    "label_logprob",
    "label_logprob_ref",
    "linear_logprob",
    "linear_logprob_and_unit",
    "linear_logprob_ref",
    "pair_sums",
    "preference_logps",
    "preference_loss",
    "preference_loss_ref",
    "rms_norm",
    "rms_norm_ref",
    "rotary",
    "rotary_ref",
    "sequence_sums",
    "shared_prefix_attention",
    "shared_prefix_attention_ref",
    "swiglu",
    "swiglu_ref",
    "why_not_attention",
    "with_unit_gradient",
    "wpo_weights",
]
