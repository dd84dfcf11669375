"""Training batches in which all questions about a chart share its image: one prefix, one branch per answer."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlavaProcessor

from fasttrain.demo.charts import KINDS, Chart, Question, ask, draw_chart

Answerer = Callable[[Question, random.Random], str]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Charts B, decoder tokens T, each row `[image prefix | question and answer | question and answer | ...]`.

    `input_ids_BT`, `position_BT` and `label_BT` are int64, labels -100 but for answers, each label standing at
    the token that predicts it; `mask_B1TT` is bool, true where a token may look; `pixel_BCHW` is float32.
    """

    input_ids_BT: Tensor
    position_BT: Tensor
    label_BT: Tensor
    mask_B1TT: Tensor
    pixel_BCHW: Tensor


def draw_batch(
    processor: LlavaProcessor,
    charts: int,
    answer: Answerer,
    rng: random.Random,
    kinds: tuple[str, ...] = KINDS,
) -> Batch:
    """New training charts, each with one question of every kind and the answer that `answer` gives."""
    drawn = [draw_chart(rng, "train") for _ in range(charts)]
    asked = [[ask(chart, kind, rng) for kind in rng.sample(kinds, len(kinds))] for chart in drawn]
    answered = [[(question, answer(question, rng)) for question in questions] for questions in asked]
    return _collate(processor, drawn, answered)


def _collate(
    processor: LlavaProcessor, drawn: list[Chart], answered: list[list[tuple[Question, str]]]
) -> Batch:
    prefix, _ = _split_prompt(processor, "")
    rows = [_row(processor, prefix, branches) for branches in answered]
    length = max(len(ids) for ids, *_ in rows)
    pad = processor.tokenizer.pad_token_id
    ids_BT = torch.tensor([ids + [pad] * (length - len(ids)) for ids, *_ in rows])
    position_BT = torch.tensor([pos + [0] * (length - len(pos)) for _, pos, *_ in rows])
    label_BT = torch.tensor([lab + [-100] * (length - len(lab)) for _, _, lab, _ in rows])
    branch_BT = torch.tensor([bra + [-1] * (length - len(bra)) for *_, bra in rows])
    pixel_BCHW = processor.image_processor([c.image() for c in drawn], return_tensors="pt")["pixel_values"]
    return Batch(
        input_ids_BT=ids_BT,
        position_BT=position_BT,
        label_BT=label_BT,
        mask_B1TT=_branch_mask(branch_BT),
        pixel_BCHW=pixel_BCHW,
    )


def _split_prompt(processor: LlavaProcessor, question: str) -> tuple[list[int], list[int]]:
    """The template's prompt around a question, cut after the image: token ids before and after the cut."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    before, _, after = processor.apply_chat_template([turn], add_generation_prompt=True).partition(
        "<image>\n"
    )
    size, patch = processor.image_processor.crop_size["height"], processor.patch_size
    image = processor.image_token * (size // patch) ** 2
    encode = processor.tokenizer.encode
    return encode(before + image + "\n"), encode(after)


def _row(
    processor: LlavaProcessor, prefix: list[int], branches: list[tuple[Question, str]]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Token ids, positions, labels and branch numbers (0 for the prefix) of one chart's row."""
    ids, label, branch = list(prefix), [-100] * len(prefix), [0] * len(prefix)
    position = list(range(len(prefix)))
    for number, (question, answer) in enumerate(branches, start=1):
        _, asked = _split_prompt(processor, question.text)
        said = [*processor.tokenizer.encode(" " + answer), processor.tokenizer.eos_token_id]
        ids += asked + said
        position += range(len(prefix), len(prefix) + len(asked) + len(said))
        label += [-100] * (len(asked) - 1) + said + [-100]
        branch += [number] * (len(asked) + len(said))
    return ids, position, label, branch


def _branch_mask(branch_BT: Tensor) -> Tensor:
    """Bool (B, 1, T, T): a token sees, up to itself, its own branch and the prefix; padding (-1) sees itself."""
    same = branch_BT[:, :, None] == branch_BT[:, None, :]
    prefix = (branch_BT == 0)[:, None, :] & (branch_BT != -1)[:, :, None]
    causal = torch.ones(branch_BT.shape[1], branch_BT.shape[1], dtype=torch.bool).tril()
    return ((same | prefix) & causal)[:, None]
