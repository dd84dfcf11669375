"""The language-model head that returns log-probs of given tokens and never makes logits for them."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fasttrain.errors import UserError, is_out_of_memory
from fasttrain.ranks import full_shape
from fasttrain_kernels import linear_logprob, linear_logprob_and_unit, with_unit_gradient

_PREFIX_MODELS = ("paligemma",)


class LogprobHead(nn.Linear):
    """`lm_head` with a second way to be called: with targets it returns fp32 log-probs instead of logits.

    Both ways are this module's forward, so that whatever gathers its weight (ZeRO-3) does so for either.
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    # set by the engine where the weight is frozen and is gathered for the module's forward only (ZeRO-3); not read off the weight,
    # which DeepSpeed would gather for the asking
    gathered_once = False

    def forward(  # type: ignore[override]
        self, hidden: Tensor, target_N: Tensor | None = None, unit: bool = False, **wants: Any
    ) -> Any:
        """hidden (..., D) -> logits; with target_N (N,): hidden (N, D) -> object with .logprob (N,) fp32.

        `wants` are `linear_logprob`'s: log_p2, entropy, top1. With `unit` the result has no history and comes with the
        unit gradients (N, D).
        """
        if target_N is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        function = linear_logprob_and_unit if unit else linear_logprob
        return function(
            # Mamba's last norm leaves fp32
            hidden.to(self.weight.dtype), self.weight, target_N, bias=self.bias, logit_scale=self.logit_scale, softcap=self.softcap,
            validate=False,  # ids come from the model's own tokenizer, whose size was checked; asking would wait for the device
            **wants,
        )  # fmt: skip

    def score(self, hidden_ND: Tensor, target_N: Tensor, **wants: bool) -> Any:
        """The same log-probs; a frozen head whose weight is sharded is not gathered again for the backward."""
        if not self.gathered_once or not torch.is_grad_enabled():
            return self(hidden_ND, target_N, **wants)
        # ZeRO-3 gathers a module's weights when the gradient of its output arrives: this output has none
        out, unit_ND = self(hidden_ND.detach(), target_N, unit=True, **wants)
        return out._replace(logprob=with_unit_gradient(hidden_ND, out.logprob, unit_ND))


def trunk(model: Any) -> Any:
    """The model without its head: `base_model`, except in classes whose prefix names no module of theirs (Llama 4's)."""
    base = model.base_model
    return getattr(model, "model", base) if base is model else base


def install_head(model: Any) -> LogprobHead:
    """Put a LogprobHead with the same parameters in place of the model's lm_head."""
    old = model.get_output_embeddings()
    if not isinstance(old, nn.Linear) or type(old).__name__ not in ("Linear", "LogprobHead"):
        raise UserError(f"model.name: wanted a model with a plain linear head, got {type(old).__name__}")
    head = LogprobHead(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
    head.weight, head.bias = old.weight, old.bias
    head.softcap, head.logit_scale = _transforms(model.config)[0]
    model.set_output_embeddings(head)
    return head


def _transforms(config: Any) -> list[tuple[float | None, float]]:
    """Softcap and scale of the logits, by the names that families have for them: all that may be meant, the likeliest first.

    Granite divides by `logits_scaling`, HyperCLOVA X multiplies.
    """
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((getattr(config, name) for name in caps if getattr(config, name, None)), None)
    scales = []
    if scaling := getattr(config, "logits_scaling", None):
        scales += [1.0 / scaling, scaling]
    scales += [
        getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier", "output_multiplier")
    ]
    return [(softcap, scale) for scale in (*scales, 1.0) if scale]


@torch.no_grad()
def check_head(model: Any, head: LogprobHead, device: torch.device) -> None:
    """Compare our log-probs with the model's own logits on a few tokens; UserError if the head does something else."""
    vocabulary = full_shape(model.get_input_embeddings().weight)[0]
    ids = torch.arange(1, 9, device=device)[None] % vocabulary
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"model.name: {type(model).__name__}, as transformers {transformers.__version__} has it, fails on a text: {problem}"
        ) from error
    theirs = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    hidden = trunk(model)(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
    off = _choose_transform(model, head, hidden, ids[0, 1:], theirs)
    if not theirs.isfinite().all():
        raise UserError(
            f"model.name: the logits of {type(model).__name__} are not finite: its weights hold nan or inf, or overflow in "
            f"{str(head.weight.dtype).removeprefix('torch.')}"
        )
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 0.25
    if not off <= tolerance * (1 + theirs.abs().max()):
        raise UserError(
            f"model.name: {type(model).__name__} computes its logits in a way fasttrain does not know "
            f"(log-prob off by {off:.3g})"
        )
    if _sees_ahead(model, ids, hidden, tolerance):
        raise UserError(
            f"model.name: wanted a causal language model, got {type(model).__name__}, in which a token sees what follows it: "
            "log-probs of answers would know the answers"
        )


def _choose_transform(
    model: Any, head: LogprobHead, hidden_ND: Tensor, target_N: Tensor, theirs_N: Tensor
) -> Tensor:
    """Give the head the softcap and scale of the model's configuration or of its text part, whichever the model applies:
    LLaVA around Gemma 2 leaves out the cap that Gemma 3n applies. Returns how far our log-probs are from the model's."""
    if hidden_ND.shape != (len(target_N), full_shape(head.weight)[1]):
        return torch.tensor(math.inf)
    found = []
    for transform in dict.fromkeys(
        [*_transforms(model.config), *_transforms(model.config.get_text_config())]
    ):
        head.softcap, head.logit_scale = transform
        found.append(((head(hidden_ND, target_N).logprob - theirs_N).abs().max(), transform))
    off, (head.softcap, head.logit_scale) = min(found, key=lambda entry: float(entry[0]))
    return off


def _sees_ahead(model: Any, ids: Tensor, hidden_TD: Tensor, tolerance: float) -> bool:
    """Whether hidden states of a text's first half change with its second. A prefix language model is asked nothing: in a
    text without images or answers every token is prefix."""
    if model.config.model_type in _PREFIX_MODELS:
        return False
    half = ids.shape[1] // 2
    other = torch.cat([ids[:, :half], ids[:, :half]], dim=1)
    changed = trunk(model)(input_ids=other, use_cache=False).last_hidden_state[0, :half]
    scale = hidden_TD[:half].abs().max().clamp(min=1.0)
    return bool((changed - hidden_TD[:half]).abs().max() > tolerance * scale)
