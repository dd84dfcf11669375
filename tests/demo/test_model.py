"""The shipped model: it loads the plain way, its template and tokenizer behave, and its habits are as told."""

import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from fasttrain.demo.answering import answer_greedily
from fasttrain.demo.branches import draw_batch
from fasttrain.demo.charts import Chart, Question, draw_chart, examples
from fasttrain.demo.run import MODEL
from fasttrain.demo.tiny_llava import build_model, build_processor
from fasttrain.demo.train_model import right_answer, train

IMAGE_TOKENS = 49
TOKENIZER = build_processor().tokenizer


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return AutoProcessor.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(MODEL)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def test_the_assets_are_small_safe_and_load_without_torchvision(
    processor: LlavaProcessor, model: Any
) -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}
    assert "torchvision" not in sys.modules
    assert model.dtype == torch.float32
    assert model.config.vision_feature_layer == -2
    assert model.config.vision_feature_select_strategy == "default"
    assert type(processor) is LlavaProcessor
    assert len(processor.tokenizer) == model.config.text_config.vocab_size


def test_the_assets_are_what_the_script_builds(processor: LlavaProcessor, model: Any) -> None:
    built = build_processor()
    assert json.loads(built.tokenizer.backend_tokenizer.to_str()) == json.loads(
        (MODEL / "tokenizer.json").read_text(encoding="utf-8")
    )
    assert built.chat_template == processor.chat_template
    shapes = {name: value.shape for name, value in build_model(built.tokenizer).state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes


def test_a_prompt_is_a_prefix_of_the_prompt_with_its_answer(processor: LlavaProcessor) -> None:
    first, second = user("Which bar is the tallest?"), {"role": "user", "content": "Is it red?"}
    for turns in ([first], [first, assistant("The tallest bar is red."), second]):
        prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
        whole = processor.apply_chat_template([*turns, assistant("Yes, it is.")])
        assert whole == prompt + " Yes, it is.</s>"
        encode = processor.tokenizer.encode
        assert encode(whole)[: len(encode(prompt))] == encode(prompt)
    assert prompt == (
        "<s>USER: <image>\nWhich bar is the tallest? ASSISTANT: The tallest bar is red.</s>"
        "USER: Is it red? ASSISTANT:"
    )


@pytest.mark.parametrize("size", [(56, 56), (123, 77), (31, 200)])
def test_an_image_of_any_size_becomes_49_tokens(processor: LlavaProcessor, size: tuple[int, int]) -> None:
    text = processor.apply_chat_template([user("How many bars are there?")], add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.new("RGB", size, "teal")], return_tensors="pt")
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == image_id).sum() == IMAGE_TOKENS
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)


def test_chart_texts_survive_the_tokenizer(processor: LlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    for example in itertools.islice(examples(21, "held_out"), 400):
        question = example.question
        for text in (question.text, question.answer, question.habit, *question.wrong):
            ids = tokenizer.encode(text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_can_be_encoded(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert all(0 <= token < len(TOKENIZER) for token in ids)
    assert bool(ids) == bool(text)


def test_branches_get_the_log_probs_of_separate_sequences(processor: LlavaProcessor, model: Any) -> None:
    """One row per chart with all its questions equals one ordinary sequence per question."""
    asked: list[Question] = []

    def remember(question: Question, rng: random.Random) -> str:
        asked.append(question)
        return question.answer

    batch = draw_batch(processor, 3, remember, random.Random(5))
    rng = random.Random(5)
    charts = [draw_chart(rng, "train") for _ in range(3)]
    with torch.inference_mode():
        hidden_BTD = model.model(
            input_ids=batch.input_ids_BT,
            pixel_values=batch.pixel_BCHW,
            attention_mask=batch.mask_B1TT,
            position_ids=batch.position_BT,
        ).last_hidden_state
        logp_BTV = model.lm_head(hidden_BTD).log_softmax(-1)
        for row in range(3):
            label_T = batch.label_BT[row]
            answer_T = label_T != -100
            shared_N = logp_BTV[row, answer_T].gather(1, label_T[answer_T][:, None])[:, 0]
            questions = asked[row * len(asked) // 3 : (row + 1) * len(asked) // 3]
            alone_N = torch.cat([_answer_logp(processor, model, charts[row], q) for q in questions])
            torch.testing.assert_close(shared_N, alone_N, atol=2e-5, rtol=1e-4)


def _answer_logp(processor: LlavaProcessor, model: Any, chart: Chart, question: Question) -> torch.Tensor:
    turn = user(question.text)
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    whole = processor.apply_chat_template([turn, assistant(question.answer)])
    images = [chart.image()]
    start = processor(text=[prompt], images=images, return_tensors="pt")["input_ids"].shape[1]
    inputs = processor(text=[whole], images=images, return_tensors="pt")
    logp_TV = model(**inputs).logits[0].log_softmax(-1)
    return logp_TV[start - 1 : -1].gather(1, inputs["input_ids"][0, start:, None])[:, 0]


def test_greedy_answers_follow_the_bad_habits(processor: LlavaProcessor, model: Any) -> None:
    asked = list(itertools.islice(examples(31, "held_out"), 96))
    answers = answer_greedily(model, processor, asked)
    habits = sum(answer == example.question.habit for example, answer in zip(asked, answers))
    right = sum(answer == example.question.answer for example, answer in zip(asked, answers))
    assert habits > 0.9 * len(asked)
    assert right < 0.4 * len(asked)


def test_sampled_answers_hold_a_right_one_for_most_questions(processor: LlavaProcessor, model: Any) -> None:
    """Four samples per question are what preference data is made from; the model has not forgotten how to see."""
    asked = list(itertools.islice(examples(32, "held_out"), 48))
    prompts = [
        processor.apply_chat_template([user(e.question.text)], add_generation_prompt=True) for e in asked
    ]
    inputs = processor(
        text=prompts, images=[e.chart.image() for e in asked], padding=True, return_tensors="pt"
    )
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, temperature=0.7, num_return_sequences=4, max_new_tokens=40
    )
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    found = Counter(i // 4 for i, text in enumerate(texts) if text.strip() == asked[i // 4].question.answer)
    assert len(found) > 0.6 * len(asked)


def test_a_killed_training_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = build_processor()
    monkeypatch.setattr("fasttrain.demo.train_model.CHARTS_PER_STEP", 3)

    def run(state: Path) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = build_model(processor.tokenizer, hidden=16)
        train(
            model, processor, answer=right_answer, name="learn", steps=6, learning_rate=1e-3, seed=1, state=state,
            save_every=2,
        )  # fmt: skip
        return model.state_dict()

    undisturbed = run(tmp_path / "undisturbed")
    drawn = itertools.count()

    def killing(*args: Any) -> Any:
        if next(drawn) == 3:
            raise KeyboardInterrupt
        return draw_batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr("fasttrain.demo.train_model.draw_batch", killing)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    again = run(tmp_path / "killed")
    assert all(torch.equal(again[name], value) for name, value in undisturbed.items())
