"""The copy of the demo's model that can read SteerLM's request says what the model said, and knows the request's words."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from fasttrain.demo.answering import answer_greedily
from fasttrain.demo.charts import examples
from fasttrain.demo.more_words import EMBEDDING, HEAD, with_request_words
from fasttrain.demo.run import MODEL
from fasttrain_data.pairs.steering import steering_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_request_words(MODEL, tmp_path_factory.mktemp("words") / "model")


def test_no_word_of_a_request_is_unknown_and_a_score_is_one_token(folder: Path) -> None:
    tokenizers: list[Any] = [AutoProcessor.from_pretrained(path).tokenizer for path in (MODEL, folder)]
    questions = [
        f"Is there a red bar?{steering_text(scores)}" for scores in ((4, 4, 4, 0, 1), (4, 3, 4, 0, 1))
    ]
    before, after = ([t.encode(q, add_special_tokens=False) for q in questions] for t in tokenizers)
    unknown = tokenizers[0].unk_token_id
    assert (
        before[0] == before[1] and before[0].count(unknown) > 20
    )  # the shipped model cannot tell them apart
    assert unknown not in after[0]
    assert [a == b for a, b in zip(*after, strict=True)].count(False) == 1


def test_known_words_keep_their_numbers_and_weights_and_the_new_ones_are_drawn_by_seed(
    folder: Path, tmp_path: Path
) -> None:
    before, after = (load_file(path / "model.safetensors") for path in (MODEL, folder))
    assert before.keys() == after.keys()
    rows = before[EMBEDDING].shape[0]
    assert after[EMBEDDING].shape[0] == after[HEAD].shape[0] == rows + 23
    assert all(torch.equal(after[name][:rows], before[name]) for name in (EMBEDDING, HEAD))
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - {EMBEDDING, HEAD})
    again = load_file(with_request_words(MODEL, tmp_path / "again") / "model.safetensors")
    assert torch.equal(again[EMBEDDING], after[EMBEDDING])


def test_its_answers_are_the_shipped_models(folder: Path) -> None:
    asked = list(itertools.islice(examples(5, "held_out"), 24))
    said = [
        answer_greedily(
            LlavaForConditionalGeneration.from_pretrained(path), AutoProcessor.from_pretrained(path), asked
        )
        for path in (MODEL, folder)
    ]
    assert said[0] == said[1] and len(set(said[0])) > 3


def test_a_copy_that_is_there_is_kept(folder: Path) -> None:
    at = (folder / "model.safetensors").stat().st_mtime_ns
    assert with_request_words(MODEL, folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == at
