"""The DPO family as formulas: each kind is a function of the sums of a pair, and says where it comes from.

c, r are log(policy / reference) summed over the chosen and the rejected answer; C, R the same through the f-divergence
(`Terms.scores`); d = C - R; Lc, Lr token counts; S the logistic function; s the label smoothing; b beta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Exponents are cut here so that e^x and its gradient stay finite in fp32 (TRL's bound).
MAX_EXPONENT = 80.0

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Everything a kind may ask for; (P,) tensors of one dtype. Lengths are None when they were not given."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    chosen_length: Tensor | None
    rejected_length: Tensor | None
    mean_chosen_length: Tensor | None
    sft_logprob: Tensor | None
    beta: float
    label_smoothing: float
    f_divergence: str
    f_alpha: float
    discopop_tau: float
    simpo_gamma: float

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """c and r."""
        assert self.ref_chosen is not None and self.ref_rejected is not None
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def scores(self) -> tuple[Tensor, Tensor]:
        """C and R."""
        c, r = self.ratios
        return self.score(c), self.score(r)

    @property
    def d(self) -> Tensor:
        chosen, rejected = self.scores
        return chosen - rejected

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        assert self.chosen_length is not None and self.rejected_length is not None
        return self.chosen_length, self.rejected_length

    def score(self, x: Tensor, most: float = MAX_EXPONENT) -> Tensor:
        """f'(policy / reference) of Wang et al., "Beyond Reverse KL", arXiv 2309.16240, from the log-ratio x."""
        if self.f_divergence == "forward_kl":
            return 1 - torch.exp((-x).clamp(max=most))
        if self.f_divergence == "js_divergence":
            return math.log(2.0) + F.logsigmoid(x)
        if self.f_divergence == "alpha_divergence" and abs(self.f_alpha - 1) >= 1e-6:
            a = self.f_alpha - 1
            return torch.expm1((a * x).clamp(max=most)) / a
        return x

    def smoothed(self, x: Tensor) -> Tensor:
        """-(1-s) log S(x) - s log S(-x)."""
        loss = -F.logsigmoid(x)
        if self.label_smoothing == 0:
            return loss
        return (1 - self.label_smoothing) * loss - self.label_smoothing * F.logsigmoid(-x)


def sigmoid(t: Terms) -> Tensor:
    """DPO, Rafailov et al., arXiv 2305.18290; with s > 0 conservative DPO, Mitchell 2023 (ericmitchell.ai/cdpo.pdf)."""
    return t.smoothed(t.beta * t.d)


def robust(t: Terms) -> Tensor:
    """Robust DPO, Chowdhury et al., arXiv 2403.00409: the unbiased form of label smoothing."""
    s, x = t.label_smoothing, t.beta * t.d
    return (s * F.logsigmoid(-x) - (1 - s) * F.logsigmoid(x)) / (1 - 2 * s)


def hinge(t: Terms) -> Tensor:
    """SLiC's hinge on DPO's margin, Zhao et al., arXiv 2305.10425; Liu et al. (RSO), arXiv 2309.06657."""
    return torch.relu(1 - t.beta * t.d)


def ipo(t: Terms) -> Tensor:
    """IPO, Azar et al., arXiv 2310.12036, eq. 17, on length-normalised scores as its authors told TRL."""
    # squared, so the exponents are cut at half
    (chosen, rejected), (lc, lr) = (t.score(x, MAX_EXPONENT / 2) for x in t.ratios), t.lengths
    return (chosen / lc - rejected / lr - 1 / (2 * t.beta)).square()


def sigmoid_norm(t: Terms) -> Tensor:
    """DPO on length-normalised scores (Tulu 3, Lambert et al., arXiv 2411.15124, section 5.1)."""
    (chosen, rejected), (lc, lr) = t.scores, t.lengths
    return -F.logsigmoid(t.beta * (chosen / lc - rejected / lr))


def exo_pair(t: Terms) -> Tensor:
    """EXO, Ji et al., arXiv 2402.00856, eq. 16 with two answers: reverse KL of (S(bd), S(-bd)) to (1-s, s)."""
    s, x = t.label_smoothing, t.beta * t.d
    chosen = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-s))
    return chosen + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(s))


def nca_pair(t: Terms) -> Tensor:
    """NCA, Chen et al., arXiv 2402.05369."""
    c, r = (t.beta * x for x in t.ratios)
    return -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r)


def bco_pair(t: Terms) -> Tensor:
    """BCO, Jung et al., arXiv 2404.04656, without its running reward shift."""
    c, r = t.ratios
    return -F.logsigmoid(t.beta * c) - F.logsigmoid(-t.beta * r)


def sppo_hard(t: Terms) -> Tensor:
    """SPPO, Wu et al., arXiv 2405.00675, eq. 4.7 with win probabilities 1 and 0."""
    c, r = t.ratios
    return (c - 0.5 / t.beta).square() + (r + 0.5 / t.beta).square()


def aot(t: Terms) -> Tensor:
    """AOT, Melnyk et al., arXiv 2406.05882: policy margins against reference margins, both sorted over the batch."""
    assert t.ref_chosen is not None and t.ref_rejected is not None
    policy, reference = t.chosen - t.rejected, t.ref_chosen - t.ref_rejected
    return t.smoothed(t.beta * (policy.sort().values - reference.sort().values))


def aot_unpaired(t: Terms) -> Tensor:
    """AOT without pairs, arXiv 2406.05882: sorted chosen log-ratios against sorted rejected ones."""
    c, r = t.ratios
    return t.smoothed(t.beta * (c.sort().values - r.sort().values))


def apo_zero(t: Terms) -> Tensor:
    """APO-zero, D'Oosterlinck et al., arXiv 2408.06266, eq. 7: chosen up, rejected down."""
    c, r = t.ratios
    return torch.sigmoid(-t.beta * c) + torch.sigmoid(t.beta * r)


def apo_down(t: Terms) -> Tensor:
    """APO-down, arXiv 2408.06266, eq. 8: chosen down, rejected further down."""
    c, r = t.ratios
    return torch.sigmoid(t.beta * c) + torch.sigmoid(-t.beta * (c - r))


def discopop(t: Terms) -> Tensor:
    """DiscoPOP, Lu et al., arXiv 2406.08414, eq. 5: logistic and exponential loss blended by the margin."""
    x = t.beta * t.d
    share = torch.sigmoid(x / t.discopop_tau)
    return (1 - share) * -F.logsigmoid(x) + share * torch.exp((-x).clamp(max=MAX_EXPONENT))


def sft(t: Terms) -> Tensor:
    """Mean NLL over the chosen tokens of the batch, as P terms whose mean it is."""
    assert t.mean_chosen_length is not None
    return -(t.chosen if t.sft_logprob is None else t.sft_logprob) / t.mean_chosen_length


def cpo(t: Terms) -> Tensor:
    """CPO's preference term, Xu et al., arXiv 2401.08417: DPO with a uniform reference; its NLL term is `sft`."""
    return t.smoothed(t.beta * (t.chosen - t.rejected))


def simpo(t: Terms) -> Tensor:
    """SimPO, Meng et al., arXiv 2405.14734: length-normalised, a target margin `simpo_gamma`, no reference."""
    lc, lr = t.lengths
    return t.smoothed(t.beta * (t.chosen / lc - t.rejected / lr) - t.simpo_gamma)


def orpo(t: Terms) -> Tensor:
    """ORPO's odds-ratio term times beta, Hong et al., arXiv 2403.07691, eq. 7; its NLL term is `sft`."""
    lc, lr = t.lengths
    chosen, rejected = t.chosen / lc, t.rejected / lr
    odds = chosen - log1mexp(chosen) - rejected + log1mexp(rejected)
    return -t.beta * F.logsigmoid(odds)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, accurate at both ends; x is kept off 0, where the odds are infinite."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def rewards_per_token(kinds: Collection[str], has_reference: bool) -> bool:
    """Whether the rewards of these kinds are of mean log-probs, as the kinds themselves: TRL's and Liger's for SimPO and ORPO."""
    preferences = set(kinds) - {"sft"}
    return not has_reference and bool(preferences) and preferences <= PER_TOKEN


_FORMULAS = (sigmoid, robust, hinge, ipo, sigmoid_norm, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired,
             apo_zero, apo_down, discopop, sft, cpo, simpo, orpo)  # fmt: skip

FORMULAS: dict[str, Callable[[Terms], Tensor]] = {f.__name__: f for f in _FORMULAS}
KINDS: tuple[str, ...] = tuple(FORMULAS)
NEED_LENGTHS = frozenset({"ipo", "sigmoid_norm", "simpo", "orpo"})
REFERENCE_FREE = frozenset({"sft", "cpo", "simpo", "orpo"})
TAKE_F_DIVERGENCE = frozenset(
    {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
)
COUPLE_PAIRS = frozenset({"aot", "aot_unpaired"})
PER_TOKEN = frozenset({"simpo", "orpo"})  # compare mean log-probs of answers
