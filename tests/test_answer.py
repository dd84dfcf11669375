"""`fasttrain answer`: the answers are the model's own, whatever the batch, the adapter, the turn or the moment of a kill."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fasttrain import UserError, cli
from fasttrain.answering.decoding import Decoding
from fasttrain.answering.generator import Generator
from fasttrain.answering.generic import GenericGenerator
from fasttrain.answering.local import LocalModel
from fasttrain.answering.questions import Question, read_questions
from fasttrain.config import ModelConfig

WORDS = (
    "the",
    "chart",
    "shows",
    "a",
    "red",
    "bar",
    "left",
    "of",
    "blue",
    "and",
    "highest",
    "value",
    "is",
    "42",
    "percent",
)


def ask(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 17))) + "?"


@pytest.fixture
def picture_questions(tmp_path: Path, tiny_models: ModuleType) -> Path:
    """Eleven questions: three about one image, two about two images, some without, some of two turns."""
    rng = random.Random(5)
    images = [[0], [0], [], [1], [2, 3], [], [0], [4], [3, 2], [5], []]
    rows = []
    for number, shown in enumerate(images):
        for image in shown:
            tiny_models.draw_image(tmp_path / f"{image}.png", seed=image)
        row: dict[str, Any] = {"question_id": number, "images": [f"{image}.png" for image in shown]}
        rows.append(row | ({"turns": [ask(rng), ask(rng)]} if number % 4 == 3 else {"text": ask(rng)}))
    return tiny_models.write_rows(tmp_path / "questions.jsonl", rows)


@pytest.fixture
def text_questions(tmp_path: Path, tiny_models: ModuleType) -> Path:
    rng = random.Random(6)
    rows = [{"question_id": f"q{n}", "turns": [ask(rng) for _ in range(1 + n % 3)]} for n in range(9)]
    return tiny_models.write_rows(tmp_path / "text.jsonl", rows)


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
    from tokenizers.processors import TemplateProcessing

    from fasttrain.data.images import image_size
    from fasttrain.data.tokens import ChatTokenizer

    build = tiny_models.build_tokenizer

    def adds_bos(*given: Any, **named: Any) -> Any:
        tokenizer = build(*given, **named)
        front = [("<s>", tokenizer.bos_token_id)]
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=front)
        return tokenizer

    monkeypatch.setattr(tiny_models, "build_tokenizer", adds_bos)
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


def test_running_out_of_memory_halves_the_batch_for_good_and_changes_no_answer(
    tiny_text: Path, text_questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = read_questions(text_questions)
    truth = answers_of(LocalModel(ModelConfig(name=str(tiny_text))), questions, Decoding(max_new_tokens=6))
    model = LocalModel(ModelConfig(name=str(tiny_text)))
    whole, sizes = model.generator.answer, []

    def tight(asked: list[Question], decoding: Decoding) -> Any:
        sizes.append(len(asked))
        if len(asked) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(asked, decoding)

    monkeypatch.setattr(model.generator, "answer", tight)
    assert answers_of(model, questions, Decoding(max_new_tokens=6)) == truth
    assert sizes[:3] == [9, 4, 2] and "out of memory with 9 questions" in capsys.readouterr().err
    monkeypatch.setattr(model.generator, "answer", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(UserError, match=r"text.jsonl line \d: one question of \d+ tokens .* does not fit"):
        answers_of(model, questions, Decoding(max_new_tokens=6))


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
    long = tiny_models.write_rows(tmp_path / "long.jsonl", [{"question_id": 1, "text": "red " * 60}])
    with pytest.raises(
        UserError, match=r"long.jsonl line 1: question: wanted fewer than the model's 40 positions"
    ):
        answers_of(model, read_questions(long), Decoding(max_new_tokens=5))


def test_a_model_that_cannot_answer_is_a_mistake_in_one_line(
    tiny_llava: Path, picture_questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from safetensors.torch import load_file, save_file

    for name in ("nan", "grid"):
        shutil.copytree(tiny_llava, tmp_path / name)
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights[next(key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))].fill_(float("nan"))
    save_file(weights, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    settings = tmp_path / "grid" / "processor_config.json"
    settings.write_text(settings.read_text().replace('"patch_size": 7', '"patch_size": 14'))
    for name, message in (("nan", "its logits are not numbers"), ("grid", "another number of image tokens")):
        words = ("answer", "-m", tmp_path / name, picture_questions, "-o", tmp_path / f"{name}.jsonl")
        assert run_command(monkeypatch, *words, "--max-new-tokens", 3) == 2
        assert (
            f"--model: {message}"
            in capsys.readouterr().err.replace("the processor writes ", "").splitlines()[-1]
        )


# ---- the command -----------------------------------------------------------------------------------------------------


def run_command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fasttrain", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_file_has_one_row_per_question_in_order_in_the_official_formats(
    tiny_llava: Path,
    picture_questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_models: ModuleType,
) -> None:
    out = tmp_path / "answers.jsonl"
    words = ("answer", "-m", tiny_llava, picture_questions, "-o", out, "--max-new-tokens", 5)
    assert run_command(monkeypatch, *words) == 0
    rows = tiny_models.read_rows(out)
    assert [row["question_id"] for row in rows] == list(range(11))
    assert set(rows[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert rows[0]["model_id"] == "tiny-llava" and rows[0]["metadata"] == {
        "finish_reason": "length",
        "tokens": 5,
    }
    assert set(rows[3]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert rows[3]["choices"][0]["index"] == 0 and len(rows[3]["choices"][0]["turns"]) == 2
    before = out.read_bytes()
    monkeypatch.setattr(
        LocalModel, "generator", property(lambda self: pytest.fail("the weights were loaded"))
    )
    assert run_command(monkeypatch, *words) == 0
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 1}, "question: wanted a question under turns, text"),
        ({"question_id": [1], "text": "a"}, "question_id: wanted text or an integer"),
        ({"question_id": 1, "turns": []}, "turns: wanted a list of texts"),
        ({"question_id": 1, "turns": ["a", "<image> b"]}, "turns: wanted <image> in the first turn only"),
        ({"question_id": 1, "text": "a", "image": "../outside.png"}, "a path inside the image root"),
        ({"question_id": 1, "text": "a", "image": "absent.png"}, "wanted an existing image file"),
        ({"question_id": 1, "text": "a", "image": "questions.jsonl"}, "images: wanted an image"),
        ({"question_id": 7, "text": "a"}, "question_id: wanted an id of its own"),
        ({"question_id": 1, "conversations": []}, "fasttrain-data questions"),
        ([1], "row: wanted a JSON object"),
    ],
)
def test_a_mistake_in_a_question_is_one_line_with_its_place(
    row: Any, message: str, tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tiny_models: ModuleType,
) -> None:  # fmt: skip
    questions = tiny_models.write_rows(tmp_path / "questions.jsonl", [{"question_id": 7, "text": "b"}, row])
    assert run_command(monkeypatch, "answer", "-m", tiny_llava, questions, "-o", tmp_path / "a.jsonl") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "questions.jsonl line 2" in err and message in err
    assert not (tmp_path / "a.jsonl").exists()


def test_other_mistakes_are_one_line(
    tmp_path: Path, tiny_text: Path, tiny_llava: Path, text_questions: Path, picture_questions: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("precious\n")
    for words, message in (
        (("-m", tmp_path, text_questions, "-o", tmp_path / "a.jsonl"), "--model: wanted a model folder"),
        (
            ("-m", tiny_text, tmp_path / "none", "-o", tmp_path / "a.jsonl"),
            "wanted a file, got nothing there",
        ),
        (
            ("-m", tiny_text, "-a", tmp_path, text_questions, "-o", tmp_path / "a.jsonl"),
            "--adapter: wanted a folder",
        ),
        (
            ("-m", tiny_text, picture_questions, "-o", tmp_path / "a.jsonl"),
            "text-only row for a text-only model",
        ),
        (("-m", tiny_text, text_questions, "-o", text_questions), "wanted another file than the input"),
        (("-m", tiny_text, text_questions, "-o", tmp_path / "mine.jsonl"), "was not written here"),
        (
            ("-m", "x", "--server", "localhost", text_questions, "-o", tmp_path / "a.jsonl"),
            "--server: wanted http",
        ),
    ):
        assert run_command(monkeypatch, "answer", *words) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert (tmp_path / "mine.jsonl").read_text() == "precious\n"


def test_help_answers_without_torch() -> None:
    code = "import sys; sys.argv = ['fasttrain', 'answer', '--help']\n" \
        "from fasttrain import cli\ntry: cli.main()\nfinally: assert 'torch' not in sys.modules"  # fmt: skip
    assert (
        "Answer every question"
        in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_answering_that_is_killed_again_and_again_writes_the_undisturbed_file(
    tiny_llava: Path, picture_questions: Path, tmp_path: Path
) -> None:
    out, calm = tmp_path / "answers.jsonl", tmp_path / "calm.jsonl"

    def start(output: Path) -> int:
        """The command in a forked child with a session of its own (imports are done once, here)."""
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            sys.stdout = sys.stderr = (tmp_path / "log.txt").open("a", buffering=1)
            sys.argv = ["fasttrain", "answer", "-m", str(tiny_llava), str(picture_questions), "-o", str(output),
                        "--batch-size", "1", "--max-new-tokens", "40", "--model-id", "m"]  # fmt: skip
            cli.main()
            os._exit(0)
        except BaseException:  # noqa: BLE001 (a forked child must not return into pytest)
            os._exit(1)

    begun = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(start(calm), 0)[1]) == 0, (tmp_path / "log.txt").read_text()
    duration = time.monotonic() - begun
    rng, kills, resumed = random.Random(1), 0, 0
    while not out.exists():
        held = tmp_path / "answers.journal.jsonl"
        before = held.read_bytes().count(b"\n") if held.exists() else 0
        pid = start(out)
        resumed += 0 < before < 11
        if kills == 6:
            os.waitpid(pid, 0)
            break
        time.sleep(duration * rng.uniform(0.2, 0.8))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        if held.exists() and not out.exists():  # as if the last line had been torn by a power cut
            with held.open("ab") as file:
                file.write(b'{"key": "torn')
    assert kills > 1 and resumed
    assert out.read_bytes() == calm.read_bytes()
    journal = [json.loads(line) for line in (tmp_path / "answers.journal.jsonl").read_text().splitlines()]
    assert sorted(entry["question_id"] for entry in journal) == list(range(11))  # nothing was answered twice
