"""Greedy answers to chart questions by plain `generate`, and how many are right."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel
from transformers.utils import logging as hf_logging

from fasttrain.demo.charts import KINDS, Example

# The longest right answer has 20 tokens; a model that runs on may do so for one more sentence.
MAX_NEW_TOKENS = 40
BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many of `total` answers are right, overall and by kind of question."""

    right: int
    total: int
    right_by_kind: dict[str, tuple[int, int]]

    @property
    def accuracy(self) -> float:
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.right, self.total)


def wilson_interval(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a binomial share, 95 % by default (Wilson, JASA 1927)."""
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"right must lie in 0..total and total be positive, got {right} of {total}")
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def load_model(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model and the processor in the folder, loaded the plain way but for transformers' progress bars."""
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        return LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    finally:
        if bars:
            hf_logging.enable_progress_bar()


@torch.inference_mode()
def answer_greedily(
    model: PreTrainedModel, processor: LlavaProcessor, asked: Sequence[Example], batch_size: int = BATCH_SIZE
) -> list[str]:
    """One answer per example, in order, without its end-of-turn token and the space before it."""
    model.eval()
    answers: list[str] = []
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        prompts = [_prompt(processor, example.question.text) for example in batch]
        images = [example.chart.image() for example in batch]
        inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
        output_ST = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new_ST = output_ST[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new_ST, skip_special_tokens=True)]
    return answers


def score(asked: Sequence[Example], answers: Sequence[str]) -> Score:
    """An answer is right when it is the true answer, word for word, and then stops."""
    by_kind = dict.fromkeys(KINDS, (0, 0))
    for example, answer in zip(asked, answers, strict=True):
        right, total = by_kind[example.question.kind]
        by_kind[example.question.kind] = (right + (answer == example.question.answer), total + 1)
    return Score(right=sum(right for right, _ in by_kind.values()), total=len(asked), right_by_kind=by_kind)


def _prompt(processor: LlavaProcessor, question: str) -> str:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return processor.apply_chat_template([turn], add_generation_prompt=True)
