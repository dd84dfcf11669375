"""Answers of a local model are the model's own, whatever the batch, the adapter or the turn."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fasttrain import UserError
from fasttrain.answering.decoding import Decoding
from fasttrain.answering.generator import Generator
from fasttrain.answering.generic import GenericGenerator
from fasttrain.answering.local import LocalModel, batch_budget
from fasttrain.answering.questions import Question, read_questions
from fasttrain.answering.run import Failed
from fasttrain.config import ModelConfig


def answers_of(model: LocalModel, questions: list[Question], decoding: Decoding) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    model.answer(questions, decoding, lambda question, replies: found.update({question.id: replies}))
    return found


def plain_answer(model: LocalModel, adapted: Any, question: Question, new: int) -> list[str]:
    """The truth: one question at a time, every turn from the start, by transformers' processor and `generate`."""
    processor = model.processor
    messages, said = [], []
    for role, parts in question.messages:
        content = [
            {"type": "image"} if kind == "image" else {"type": "text", "text": text} for kind, text in parts
        ]
        messages.append({"role": role, "content": content})
    from PIL import Image

    images = [Image.open(image.path).convert("RGB") for image in question.images]
    for turn in range(question.turns):
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        options = {"images": images} if images else {}
        inputs = processor(text=text, add_special_tokens=False, return_tensors="pt", **options)
        out = adapted.generate(**inputs, max_new_tokens=new, do_sample=False)
        tokenizer = getattr(processor, "tokenizer", processor)
        said.append(
            tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        )
        messages.append({"role": "assistant", "content": [{"type": "text", "text": said[-1] or " "}]})
        if turn + 1 < question.turns:
            later = {"type": "text", "text": question.later_turns[turn]}
            messages.append({"role": "user", "content": [later]})
    return said


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_every_batch_size_gives_generates_own_answers_with_images_and_turns(
    tiny_llava: Path, picture_questions: Path, rows: int
) -> None:
    model = LocalModel(ModelConfig(name=str(tiny_llava)), rows=rows)
    questions = read_questions(picture_questions)
    found = answers_of(model, questions, Decoding(max_new_tokens=14))
    assert isinstance(model.generator, Generator)
    for question in questions:
        truth = plain_answer(model, model.generator.model, question, 14)
        assert [reply.text for reply in found[question.id]] == truth


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_every_batch_size_gives_generates_own_answers_to_text(
    tiny_text: Path, text_questions: Path, rows: int
) -> None:
    model = LocalModel(ModelConfig(name=str(tiny_text)), rows=rows)
    questions = read_questions(text_questions)
    found = answers_of(model, questions, Decoding(max_new_tokens=11))
    for question in questions:
        truth = plain_answer(model, model.generator.model, question, 11)
        assert [reply.text for reply in found[question.id]] == truth


def test_answers_end_at_the_first_stop_token_and_say_so(tiny_text: Path, text_questions: Path) -> None:
    model = LocalModel(ModelConfig(name=str(tiny_text)))
    questions = read_questions(text_questions)
    free = answers_of(model, questions, Decoding(max_new_tokens=9))
    assert {reply.finish for replies in free.values() for reply in replies} == {"length"}
    prompt_1T = torch.tensor(model.generator.prompt_ids(questions[0]))[None].long()
    first = model.generator.model.generate(prompt_1T, max_new_tokens=5, do_sample=False)[0, -1].item()
    stopped = LocalModel(ModelConfig(name=str(tiny_text)))
    stopped.stops = [*stopped.stops, first]
    (reply,) = answers_of(stopped, questions[:1], Decoding(max_new_tokens=9))["q0"]
    assert reply.finish == "stop" and reply.tokens <= 5
    assert free["q0"][0].text.startswith(reply.text) and reply.text != free["q0"][0].text


def test_an_image_goes_through_the_model_once_for_all_questions_and_turns_of_a_batch(
    tiny_llava: Path, picture_questions: Path
) -> None:
    model = LocalModel(ModelConfig(name=str(tiny_llava)))
    answers_of(model, read_questions(picture_questions), Decoding(max_new_tokens=3))
    assert isinstance(model.generator, Generator)
    # images 0, 1, 4, 5 alone, and two orders of 2 and 3; number 0 is asked about three times
    assert model.generator.images_encoded == 4 + 2 * 2


def test_layers_that_cannot_share_go_through_generate(
    tiny_mistral_sliding: Path, text_questions: Path
) -> None:
    found = {}
    for rows in (1, 4):
        model = LocalModel(ModelConfig(name=str(tiny_mistral_sliding)), rows=rows)
        questions = read_questions(text_questions)
        found[rows] = answers_of(model, questions, Decoding(max_new_tokens=8))
        assert isinstance(model.generator, GenericGenerator)
    assert found[1] == found[4]
    truth = plain_answer(model, model.generator.model, questions[2], 8)
    assert [reply.text for reply in found[1]["q2"]] == truth


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(0, 200, 2))},
        {"num_beams": 3},
        {"min_new_tokens": 8, "do_sample": True, "temperature": 0.1, "top_k": 5},
    ],
)
def test_the_models_own_generation_settings_change_no_answer(
    own: dict[str, Any], tiny_mistral_sliding: Path, text_questions: Path, tmp_path: Path
) -> None:
    """The same weights with and without penalties in generation_config.json; with an adapter round them too."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "penalised"
    shutil.copytree(tiny_mistral_sliding, folder)
    (folder / "generation_config.json").write_text(json.dumps(own))
    questions = read_questions(text_questions)
    plain, model = (LocalModel(ModelConfig(name=str(name))) for name in (tiny_mistral_sliding, folder))
    # more stops are met early, so that a least length would show
    plain.stops = model.stops = [*plain.stops, *range(100, 116)]
    truth = answers_of(plain, questions, Decoding(max_new_tokens=12))
    assert answers_of(model, questions, Decoding(max_new_tokens=12)) == truth
    bare = model.generator.model
    kept = dict(bare.generation_config.to_dict())
    adapted = get_peft_model(bare, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    generic = GenericGenerator(adapted, model.processor, model.stops)
    for question in questions:
        assert generic.answer([question], Decoding(max_new_tokens=12)) == [truth[question.id]]
    assert bare.generation_config.to_dict() == kept and kept.items() >= own.items()


def test_the_generic_way_answers_about_images_as_the_shared_one_does(
    tiny_llava: Path, picture_questions: Path
) -> None:
    model = LocalModel(ModelConfig(name=str(tiny_llava)))
    questions = read_questions(picture_questions)
    shared = answers_of(model, questions, Decoding(max_new_tokens=7))
    generic = GenericGenerator(model.generator.model, model.processor, model.stops)
    for question in questions:
        ((replies),) = generic.answer([question], Decoding(max_new_tokens=7))
        assert replies == shared[question.id]


def test_what_a_models_own_code_raises_in_generate_is_one_line(
    tiny_llava: Path, picture_questions: Path
) -> None:
    model = LocalModel(ModelConfig(name=str(tiny_llava)))
    generic = GenericGenerator(model.generator.model, model.processor, model.stops)
    question = next(q for q in read_questions(picture_questions) if q.images)
    model.processor.num_additional_image_tokens = 0
    with pytest.raises(UserError, match=r"^--model: the processor writes another number of image tokens"):
        generic.answer([question], Decoding(max_new_tokens=2))

    def fails(hidden: Any) -> None:
        raise AttributeError("'Output' object\nhas no 'image_outputs'")

    model.processor.num_additional_image_tokens = 1
    generic.model.lm_head.forward = fails
    wanted = r"^--model: LlavaFor.*, as .* has it, fails on a question: AttributeError: 'Output' object has no 'image_outputs'$"
    with pytest.raises(UserError, match=wanted):
        generic.answer([question], Decoding(max_new_tokens=2))


def test_another_vision_family_answers_about_images_whatever_the_batch(
    tiny_models: ModuleType, picture_questions: Path, tmp_path: Path
) -> None:
    families = runpy.run_path(str(Path(__file__).with_name("tiny_families.py")))
    folder = families["save"](tiny_models, tmp_path / "qwen2-vl", "Qwen2-VL")
    questions = read_questions(picture_questions)
    found = {}
    for rows in (1, 4):
        model = LocalModel(ModelConfig(name=str(folder)), rows=rows)
        found[rows] = answers_of(model, questions, Decoding(max_new_tokens=6))
        assert isinstance(model.generator, GenericGenerator)
    assert found[1] == found[4]
    for question in questions[:4]:
        truth = plain_answer(model, model.generator.model, question, 6)
        assert [reply.text for reply in found[1][question.id]] == truth


def test_an_adapter_with_a_trained_projector_answers_as_peft_loads_it(
    tiny_llava: Path, picture_questions: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(3)
    base = LlavaForConditionalGeneration.from_pretrained(tiny_llava)
    config = LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.q_proj",
        modules_to_save=["multi_modal_projector"],
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "run" / "final")
    questions = read_questions(picture_questions)
    plain = LocalModel(ModelConfig(name=str(tiny_llava)))
    model = LocalModel(ModelConfig(name=str(tiny_llava)), tmp_path / "run")
    assert model.version != plain.version
    found = answers_of(model, questions, Decoding(max_new_tokens=8))
    truth = PeftModel.from_pretrained(
        LlavaForConditionalGeneration.from_pretrained(tiny_llava), tmp_path / "run" / "final"
    )
    for question in questions:
        assert [reply.text for reply in found[question.id]] == plain_answer(model, truth, question, 8)
    assert found != answers_of(plain, questions, Decoding(max_new_tokens=8))


@pytest.mark.parametrize("family", ["text", "LLaVA-1.5", "LLaVA-NeXT"])
@pytest.mark.parametrize("bos", ["template", "tokenizer"])
def test_a_question_is_asked_with_the_prompt_ids_of_training(
    family: str, bos: Any, tiny_models: ModuleType, tiny_families: ModuleType, tmp_path: Path, picture_questions: Path, text_questions: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from fasttrain.data.images import image_size
    from fasttrain.data.tokens import ChatTokenizer

    tiny_models.let_tokenizers_begin(monkeypatch)
    folder = tmp_path / "model"
    if family == "LLaVA-NeXT":
        tiny_families.save(tiny_models, folder, family)
    elif family == "text":  # a window: no shared prompts, so `generate`
        tiny_models.build_mistral_sliding(folder)
    else:
        tiny_models.build_llava(folder, template=tiny_models.CHATML)
    model = LocalModel(ModelConfig(name=str(folder), bos=bos))
    questions = read_questions(text_questions if family == "text" else picture_questions)[:3]
    chat = ChatTokenizer(model.processor, model.stops, bos)
    if not isinstance(model.generator, GenericGenerator):
        for question in questions:
            assert (
                model.generator.prompt_ids(question).tolist()
                == chat.prompt(question.messages, "x").ids.tolist()
            )
        return
    for question in questions:
        (inputs,) = [
            model.generator._tokens([model.generator._with_images(question, question.messages)], question)
        ]
        sizes = [image_size(image) for image in question.images]
        truth = chat.prompt(question.messages, "x", sizes).ids.tolist()
        assert inputs["input_ids"][0].tolist() == truth
        assert (truth[0] == chat.tokenizer.bos_token_id) == (bos == "tokenizer")


def test_an_adapter_answers_with_the_bos_of_its_run(tmp_path: Path) -> None:
    from fasttrain.answering.local import bos_of_run

    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (final / name).touch()
    assert bos_of_run(tmp_path / "run") == "template"
    (tmp_path / "run" / "config.yaml").write_text("model: {name: m, bos: tokenizer}\n")
    assert bos_of_run(tmp_path / "run") == bos_of_run(final) == "tokenizer"
    (tmp_path / "run" / "config.yaml").write_text("model: {name: m}\n")
    assert bos_of_run(tmp_path / "run") == "template"


def test_a_sample_depends_on_the_seed_and_its_own_question_alone(
    tiny_text: Path, text_questions: Path
) -> None:
    questions = read_questions(text_questions)
    decoding = Decoding(max_new_tokens=10, temperature=1.3, top_p=0.9, seed=4)
    all_at_once = answers_of(LocalModel(ModelConfig(name=str(tiny_text))), questions, decoding)
    few = LocalModel(ModelConfig(name=str(tiny_text)), rows=2)
    assert answers_of(few, questions[::-2], decoding) == {
        question.id: all_at_once[question.id] for question in questions[::-2]
    }
    other = Decoding(max_new_tokens=10, temperature=1.3, top_p=0.9, seed=5)
    assert answers_of(few, questions, other) != all_at_once
    assert answers_of(few, questions, Decoding(max_new_tokens=10)) != all_at_once


def test_sampling_follows_the_models_distribution_within_the_nucleus() -> None:
    from fasttrain.answering.picking import TokenPicker

    logit_V = torch.tensor([2.0, 1.5, 0.0, -1.0, -9.0])
    draws = 20_000
    picker = TokenPicker([0.8] * draws, list(range(draws)), 0.9, torch.device("cpu"))
    share_V = torch.bincount(picker.pick(logit_V.expand(draws, -1)), minlength=5) / draws
    p_V = (logit_V / 0.8).softmax(-1)  # .59 .32 .05 .01: the first two are .91
    wanted_V = torch.where(torch.arange(5) < 2, p_V, 0) / p_V[:2].sum()
    assert torch.allclose(share_V, wanted_V, atol=0.012)
    assert share_V[2:].sum() == 0


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_running_out_of_memory_halves_the_batch_for_good_and_changes_no_answer(
    tiny_text: Path, text_questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    device: str,
) -> None:  # fmt: skip
    def run_out() -> None:
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        torch.empty(1 << 61, dtype=torch.int8)  # what torch itself raises

    questions = read_questions(text_questions)
    truth = answers_of(LocalModel(ModelConfig(name=str(tiny_text))), questions, Decoding(max_new_tokens=6))
    model = LocalModel(ModelConfig(name=str(tiny_text)))
    whole, sizes = model.generator.answer, []

    def tight(asked: list[Question], decoding: Decoding) -> Any:
        sizes.append(len(asked))
        if len(asked) > 2:
            run_out()
        return whole(asked, decoding)

    monkeypatch.setattr(model.generator, "answer", tight)
    assert answers_of(model, questions, Decoding(max_new_tokens=6)) == truth
    assert sizes[:3] == [9, 4, 2] and "out of memory with 9 questions" in capsys.readouterr().err
    monkeypatch.setattr(model.generator, "answer", lambda *_: run_out())
    with pytest.raises(UserError, match=r"text.jsonl line \d: one question of \d+ tokens .* does not fit"):
        answers_of(model, questions, Decoding(max_new_tokens=6))


def test_a_batch_may_fill_the_memory_that_torch_holds_unused_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In training that is nearly all of what a benchmark's questions can have."""
    from transformers import LlamaConfig

    for name, told in (
        ("mem_get_info", (1 << 20, 80 << 30)),
        ("memory_reserved", 70 << 30),
        ("memory_allocated", 30 << 30),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, told=told: told)
    config = LlamaConfig(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40)
    model = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, config=config)
    a_token = 2 * 40 * 5120 * 2
    assert batch_budget(model).tokens == (((40 << 30) + (1 << 20)) * 7 // 10) // a_token


def test_a_model_with_a_table_of_positions_stops_at_its_end(tmp_path: Path, tiny_models: ModuleType) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny_models.build_tokenizer(tiny_models.CHATML, eos="<|im_end|>")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=40,
        bos_token_id=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    tiny_models.draw_weights(GPT2LMHeadModel(config), 1).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    rows = [
        {"question_id": 1, "text": "the chart?"},
        {"question_id": 2, "text": "the red bar and the blue bar?"},
    ]
    questions = read_questions(tiny_models.write_rows(tmp_path / "q.jsonl", rows))
    model = LocalModel(ModelConfig(name=str(tmp_path / "gpt2")))
    found = answers_of(model, questions, Decoding(max_new_tokens=100))
    for question in questions:
        (reply,) = found[question.id]
        assert len(model.generator.prompt_ids(question)) + reply.tokens == 40 or reply.finish == "stop"
    assert any(replies[0].finish == "length" for replies in found.values())
    long = [
        {"question_id": 3, "text": "red " * 60},
        rows[0],
        {"question_id": 4, "turns": ["the bar?", "red " * 60, "and the chart?"]},
    ]
    asked = read_questions(tiny_models.write_rows(tmp_path / "long.jsonl", long))
    several = answers_of(model, asked, Decoding(max_new_tokens=5))
    assert several[1] == answers_of(model, questions[:1], Decoding(max_new_tokens=5))[1]
    for name in (3, 4):  # the others are answered all the same
        assert isinstance(several[name], Failed)
        assert re.fullmatch(
            r"too_long: wanted fewer than the model's 40 positions, got \d+ tokens", str(several[name])
        )


@pytest.mark.parametrize("way", ["shared", "generate"])
def test_a_question_that_cannot_be_asked_fails_alone(
    way: str, tiny_llava: Path, tiny_models: ModuleType, tmp_path: Path
) -> None:
    """A template that takes no system turn, a picture that is cut in its body."""
    from PIL import Image

    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    noise.save(tmp_path / "whole.png")
    noise.save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    rows = [
        {
            "question_id": "system",
            "prompt": [{"role": "system", "content": "-"}, {"role": "user", "content": "the bar?"}],
        },
        {"question_id": "cut", "text": "the bar?", "image": "cut.jpg"},
        {"question_id": "good", "text": "the bar?", "image": "whole.png"},
        {"question_id": "turns", "turns": ["the chart?", "the red bar?"]},
    ]
    questions = read_questions(tiny_models.write_rows(tmp_path / "q.jsonl", rows))
    model = LocalModel(ModelConfig(name=str(tiny_llava)))
    template = model.processor.chat_template
    refusal = "{%- if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    model.processor.chat_template = model.processor.tokenizer.chat_template = refusal + template
    if way == "generate":
        model.generator = GenericGenerator(model.generator.model, model.processor, model.stops)
    found = answers_of(model, questions, Decoding(max_new_tokens=4))
    assert [name for name, replies in found.items() if isinstance(replies, Failed)] == ["system", "cut"]
    assert re.match(r"refused_request: .*no system turn", str(found["system"]))
    assert re.match(r"bad_image: .*cut\.jpg", str(found["cut"]))
    assert len(found["good"]) == 1 and len(found["turns"]) == 2


def test_a_question_that_only_the_processor_refuses_fails_alone(
    tiny_models: ModuleType, tiny_families: ModuleType, tmp_path: Path
) -> None:
    """Text with the model's image token in it: the run ended in a traceback."""
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    texts = {"first": "the bar?", "token": "the <|image_pad|> bar?", "last": "the bar?"}
    rows = [{"question_id": name, "text": text, "image": "a.png"} for name, text in texts.items()]
    questions = read_questions(tiny_models.write_rows(tmp_path / "q.jsonl", rows))
    model = LocalModel(ModelConfig(name=str(tiny_families.save(tiny_models, tmp_path / "model", "Qwen2-VL"))))
    found = answers_of(model, questions, Decoding(max_new_tokens=4))
    assert re.match("refused_request: ", str(found["token"])), found["token"]
    assert len(found["first"]) == len(found["last"]) == 1


def test_questions_beyond_a_models_trained_length_are_told(
    tmp_path: Path, tiny_models: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rotary positions run on beyond it, and the answers get worse without a word."""
    folder = tiny_models.build_text(tmp_path / "text", max_position_embeddings=48)
    rows = [{"question_id": n, "text": "red " * words} for n, words in enumerate((60, 4, 90))]
    questions = read_questions(tiny_models.write_rows(tmp_path / "q.jsonl", rows))
    model = LocalModel(ModelConfig(name=str(folder)))
    lengths = [len(model.generator.prompt_ids(question)) for question in questions]
    assert lengths[1] + 3 <= 48 < lengths[0] < lengths[2]
    answers_of(model, questions, Decoding(max_new_tokens=3))
    told = "note: 2 of 3 questions with their answers are longer than the 48 tokens the model was trained on"
    assert f"{told}, first {tmp_path}/q.jsonl line 1" in capsys.readouterr().err
    answers_of(model, questions[1:2], Decoding(max_new_tokens=3))
    assert "trained on" not in capsys.readouterr().err
    answers_of(model, questions[1:2], Decoding(max_new_tokens=60))
    reached = "1 of 1 questions with their answers are longer" in capsys.readouterr().err
    assert reached == (lengths[1] + answered(model, questions[1], 60) > 48)


def answered(model: LocalModel, question: Question, new: int) -> int:
    return int(answers_of(model, [question], Decoding(max_new_tokens=new))[question.id][0].tokens)
