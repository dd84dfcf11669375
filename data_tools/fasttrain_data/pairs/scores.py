"""One number from five scores: the weights of `--score`."""

from __future__ import annotations

from dataclasses import dataclass

from fasttrain_data.errors import UserError
from fasttrain_data.records import ATTRIBUTES

# hcc: the paper's code. nemotron: the model card of Nemotron-4-340B-Reward.
NAMED = {
    "hcc": (1.0, 1.0, 1.0, 0.0, 0.0),
    "all5": (1.0, 1.0, 1.0, 1.0, 1.0),
    "nemotron": (0.3, 0.74, 0.46, 0.47, -0.33),
}
_SHORT = dict(zip(("h", "c", "co", "cx", "v"), ATTRIBUTES, strict=True))
# Far below any difference of weighted sums of small integers, far above their rounding.
ROUNDING = 1e-6
_LARGEST = 1e6  # of a weight: sums of far larger ones round away a point, or are infinite and all equal


@dataclass(frozen=True)
class ScoreRule:
    """name: as the user gave it. weights: of helpfulness, correctness, coherence, complexity, verbosity."""

    name: str
    weights: tuple[float, float, float, float, float]

    def of(self, scores: tuple[int, ...]) -> float:
        total = sum(weight * score for weight, score in zip(self.weights, scores, strict=True))
        return round(total, 9)

    def span(self) -> tuple[float, float]:
        """The smallest and largest score possible."""
        low = sum(4 * weight for weight in self.weights if weight < 0)
        return low, sum(4 * weight for weight in self.weights if weight > 0)


def parse_score(text: str) -> ScoreRule:
    """`hcc`, `all5`, `nemotron`, or weights such as `h=1,c=1,co=0.5`; UserError if it is none of them."""
    if text in NAMED:
        return ScoreRule(text, NAMED[text])
    weights, given = dict.fromkeys(ATTRIBUTES, 0.0), set[str]()
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        attribute = _SHORT.get(key, key)
        try:
            if not equals or attribute not in weights or not abs(weight := float(value)) <= _LARGEST:
                raise ValueError
            if attribute in given:
                raise UserError(f"--score: wanted one weight for {attribute}, got two in {text!r}")
            given.add(attribute)
            weights[attribute] = weight
        except ValueError:
            known = ", ".join([*NAMED, "h=..,c=..,co=..,cx=..,v=.."])
            raise UserError(f"--score: wanted {known}, got {text!r}") from None
    if not any(weights.values()):
        raise UserError(f"--score: wanted at least one weight that is not 0, got {text!r}")
    return ScoreRule(text, tuple(weights.values()))  # type: ignore[arg-type]
