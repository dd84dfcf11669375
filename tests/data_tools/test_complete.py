"""Sampling: exact against a plain loop, each prompt and image once, resumable to the single sample."""

import itertools

import pytest

from fasttrain_data.calls.failures import CallFailed
from fasttrain_data.completions import build
from fasttrain_data.completions.build import complete
from fasttrain_data.completions.local import LocalSampler, gumbel_sampler, load_sampler
from fasttrain_data.completions.samples import Drawn, SampleSettings, messages_of, samples_of
from fasttrain_data.errors import UserError
from fasttrain_data.image_files import read_image
from fasttrain_data.records import Question


def batch_of(questions, settings):
    rows = [Question.model_validate_json(line) for line in questions.read_text().splitlines()]
    images = [tuple(read_image(questions.parent / name) for name in row.images) for row in rows]
    return [samples_of(row, image, settings, "v") for row, image in zip(rows, images, strict=True)]


def by_plain_loop(sampler, sample, settings):
    """One sample, one token at a time, everything recomputed at every step: no cache, no batch, no padding."""
    import torch
    from PIL import Image

    processor = sampler.processor
    prompt = processor.apply_chat_template(
        messages_of(sample.question, 1), add_generation_prompt=True, tokenize=False
    )
    picture = Image.open(__import__("io").BytesIO(sample.images[0].content)).convert("RGB")
    inputs = processor(text=prompt, images=picture, return_tensors="pt", add_special_tokens=False)
    ids = inputs["input_ids"]
    generator = torch.Generator().manual_seed(sample.seed)
    tokens = []
    for _ in range(settings.max_new_tokens):
        with torch.no_grad():
            logits = sampler.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1].float()
        noise = torch.empty_like(logits).exponential_(generator=generator)
        token = int((logits / settings.temperature - noise.log()).argmax())
        tokens.append(token)
        if token == processor.tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return processor.tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_sample_is_what_a_plain_loop_with_its_seed_gives(questions, tiny_llava):
    settings = SampleSettings(model=str(tiny_llava), samples=3, temperature=0.9, max_new_tokens=9)
    sampler = load_sampler(settings)
    batch = batch_of(questions, settings)
    drawn = sampler.draw_batch(batch)
    for sample, result in zip(itertools.chain(*batch), drawn, strict=True):
        assert result.text == by_plain_loop(sampler, sample, settings)
    assert len({result.text for result in drawn}) == 9


def test_a_sample_takes_no_penalties_from_the_models_settings(questions, tiny_llava):
    settings = SampleSettings(model=str(tiny_llava), samples=2, temperature=0.3, max_new_tokens=12)
    sampler = load_sampler(settings)
    batch = batch_of(questions, settings)
    truth = [drawn.text for drawn in sampler.draw_batch(batch)]
    sampler.model.generation_config.repetition_penalty = 1.8
    assert [drawn.text for drawn in sampler.draw_batch(batch)] == truth
    assert sampler.model.generation_config.repetition_penalty == 1.8  # put back


def test_a_sample_does_not_depend_on_its_neighbours(questions, tiny_llava):
    settings = SampleSettings(model=str(tiny_llava), samples=4, temperature=1.0, max_new_tokens=7, top_p=0.9)
    sampler = load_sampler(settings)
    batch = batch_of(questions, settings)
    together = [drawn.text for drawn in sampler.draw_batch(batch)]
    some = [[batch[2][3], batch[2][1]], [batch[0][0]]]
    assert [drawn.text for drawn in sampler.draw_batch(some)] == [together[11], together[9], together[0]]


def test_prompt_and_image_go_through_the_model_once_for_all_samples(questions, tiny_llava):
    import torch

    settings = SampleSettings(model=str(tiny_llava), samples=5, max_new_tokens=4)
    sampler = load_sampler(settings)
    images, rows = [], []
    tower = sampler.model.model.vision_tower
    tower.register_forward_hook(
        lambda module, args, kwargs, output: images.append(
            args[0].shape[0] if args else kwargs["pixel_values"].shape[0]
        ),
        with_kwargs=True,
    )
    layer = sampler.model.model.language_model.layers[0]
    layer.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(tuple(args[0].shape[:2])), with_kwargs=True
    )
    sampler.draw_batch(batch_of(questions, settings))
    assert images == [3]  # one per question, not fifteen
    prefill, *steps = rows
    assert prefill[0] == 3
    assert steps == [(15, 1)] * 4
    assert isinstance(sampler.model.dtype, torch.dtype)


def test_the_sampler_draws_from_the_models_distribution():
    import torch

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    count, temperature = 4000, 0.7
    sampler = gumbel_sampler(range(count), temperature, 1.0, torch.device("cpu"))
    drawn = sampler(torch.zeros(count, 1, dtype=torch.long), logits.expand(count, -1)).argmax(-1)
    share = torch.bincount(drawn, minlength=5) / count
    wanted = torch.softmax(logits / temperature, -1)
    assert torch.all((share - wanted).abs() < 4 * (wanted * (1 - wanted) / count).sqrt() + 1e-3)
    nucleus = gumbel_sampler(range(count), 1.0, 0.6, torch.device("cpu"))
    kept = nucleus(torch.zeros(count, 1, dtype=torch.long), logits.expand(count, -1)).argmax(-1)
    assert set(kept.tolist()) == {0}  # softmax gives the first 0.64


def test_text_models_and_sliding_windows_sample_exactly_too(
    tmp_path, write_rows, tiny_text, tiny_mistral_sliding
):
    import torch

    rows = [
        {"id": "a", "question": "what is the value of the highest bar in this picture, please answer?"},
        {"id": "b", "question": "why?"},
    ]
    path = write_rows(tmp_path / "q.jsonl", rows)
    for folder in (tiny_text, tiny_mistral_sliding):
        settings = SampleSettings(model=str(folder), samples=2, max_new_tokens=30)
        sampler = load_sampler(settings)
        batch = batch_of(path, settings)
        for sample, drawn in zip(itertools.chain(*batch), sampler.draw_batch(batch), strict=True):
            turn = [{"role": "user", "content": sample.question.question}]
            text = sampler.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            ids = sampler.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            generator, tokens = torch.Generator().manual_seed(sample.seed), []
            for _ in range(30):
                with torch.no_grad():
                    logits = sampler.model(input_ids=ids).logits[0, -1].float()
                noise = torch.empty_like(logits).exponential_(generator=generator)
                tokens.append(int((logits / 0.7 - noise.log()).argmax()))
                if tokens[-1] == sampler.tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, torch.tensor([tokens[-1:]])], dim=1)
            assert drawn.text == sampler.tokenizer.decode(tokens, skip_special_tokens=True)
            assert drawn.finish_reason == (
                "stop" if len(tokens) < 30 or tokens[-1] == sampler.tokenizer.eos_token_id else "length"
            )
            assert drawn.tokens == len(tokens)


class Scripted:
    """A sampler whose texts follow from question and sample number; `dies_after` samples it stops."""

    model_version, prompt_hash = "v", "p"

    def __init__(self, text, dies_after=10**9):
        self.text, self.left, self.drawn = text, dies_after, []

    def draw(self, samples, done):
        for sample in itertools.chain.from_iterable(samples):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            self.drawn.append((sample.question.id, sample.index))
            text = self.text(sample)
            done(sample, text if isinstance(text, CallFailed) else Drawn(text, "stop", 3, "v"))


def test_a_stopped_run_goes_on_at_the_next_sample(questions, tmp_path, read_rows):
    settings = SampleSettings(model="m", samples=4)
    out = tmp_path / "c.jsonl"

    def text(sample):
        return f"{sample.question.id} {sample.seed}"

    whole = Scripted(text)
    complete(questions, tmp_path / "whole.jsonl", settings, whole, quiet=True)
    first, second = Scripted(text, dies_after=5), Scripted(text)
    with pytest.raises(KeyboardInterrupt):
        complete(questions, out, settings, first, quiet=True)
    assert not out.exists()
    complete(questions, out, settings, second, quiet=True)
    assert first.drawn + second.drawn == whole.drawn
    keys = ("id", "question_id", "images", "question", "text", "seed", "count", "temperature", "model")
    assert [[row[key] for key in keys] for row in read_rows(out)] == [
        [row[key] for key in keys] for row in read_rows(tmp_path / "whole.jsonl")
    ]
    third = Scripted(text)
    complete(questions, out, SampleSettings(model="m", samples=6), third, quiet=True)
    assert third.drawn == [(question, index) for question in ("qa", "qb", "qc") for index in (4, 5)]
    fourth = Scripted(text)
    complete(questions, out, SampleSettings(model="m", samples=4, temperature=1.2), fourth, quiet=True)
    assert len(fourth.drawn) == 12


def test_progress_goes_to_the_number_of_samples_wanted(questions, tmp_path, monkeypatch):
    """Without a total a terminal told neither how far sampling is nor how long it will take."""
    shown = []

    class Shown(build.Progress):
        def close(self):
            shown.append((self._done, self.total))

    monkeypatch.setattr(build, "Progress", Shown)
    (tmp_path / "2.png").write_bytes(b"no image")
    questions.write_text(
        questions.read_text() + questions.read_text().splitlines()[0] + "\n"
    )  # a repeated one
    settings, out = SampleSettings(model="m", samples=4), tmp_path / "c.jsonl"
    with pytest.raises(KeyboardInterrupt):
        complete(questions, out, settings, Scripted(lambda sample: "text", dies_after=3), quiet=True)
    complete(questions, out, settings, Scripted(lambda sample: "text"), quiet=True)
    assert shown == [(3, 16), (16, 16)]


def test_equal_samples_are_kept_once_with_their_count_and_seeds(questions, tmp_path, read_rows):
    sampler = Scripted(lambda sample: ["same", " same\n", "other", "same"][sample.index])
    complete(questions, tmp_path / "c.jsonl", SampleSettings(model="m"), sampler, quiet=True)
    rows = read_rows(tmp_path / "c.jsonl")
    assert [(row["text"], row["count"], len(row["seeds"])) for row in rows] == [
        ("same", 3, 3),
        ("other", 1, 1),
    ] * 3
    assert all(row["seed"] == row["seeds"][0] for row in rows)
    assert rows[4]["history"] == [
        {"role": "user", "text": "what is it?"},
        {"role": "assistant", "text": "the chart"},
    ]


def test_bad_images_and_empty_and_failed_samples_are_counted(questions, tmp_path, read_rows):
    (tmp_path / "2.png").write_bytes(b"no image")

    def text(sample):
        return [CallFailed("timeout", "late"), "", "fine", "fine too"][sample.index]

    result = complete(questions, tmp_path / "c.jsonl", SampleSettings(model="m"), Scripted(text), quiet=True)
    assert (result.questions, result.completions, result.failed) == (3, 4, 2)
    assert result.account.dropped == {
        "questions": {"bad image": 1},
        "samples": {"timeout": 2, "empty text": 2},
    }
    assert len(read_rows(tmp_path / "c.skipped.jsonl")) == 5
    again = Scripted(text)
    complete(questions, tmp_path / "c.jsonl", SampleSettings(model="m"), again, quiet=True)
    assert {index for _, index in again.drawn} == {
        0
    }  # failed samples are drawn again, empty ones are results


def test_mistakes_about_the_model_are_one_line(questions, tmp_path, command, tiny_text):
    out = tmp_path / "c.jsonl"
    code, _, stderr = command("complete", questions, "-o", out, "-m", tmp_path / "no-model")
    assert (code, stderr.count("\n")) == (2, 1)
    assert stderr.startswith("fasttrain-data: --model: ")
    code, _, stderr = command("complete", questions, "-o", out, "-m", tiny_text)
    assert (code, "wanted a model that takes images" in stderr) == (2, True)
    code, _, stderr = command("complete", questions, "-o", out, "-m", tiny_text, "-a", tmp_path)
    assert (code, "adapter_config.json" in stderr) == (2, True)


def test_an_adapter_changes_the_samples_and_their_keys(questions, tiny_llava, tiny_models, tmp_path):
    adapter = tiny_models.build_adapter(tiny_llava, tmp_path / "adapter", b_std=0.5)
    settings = SampleSettings(model=str(tiny_llava), samples=2, max_new_tokens=6)
    plain, tuned = load_sampler(settings), load_sampler(settings, adapter=adapter)
    batch = batch_of(questions, settings)
    assert plain.model_version != tuned.model_version
    assert [drawn.text for drawn in plain.draw_batch(batch)] != [
        drawn.text for drawn in tuned.draw_batch(batch)
    ]


def test_an_adapter_without_some_of_its_weights_is_refused_not_drawn_anew(
    questions, tiny_llava, tiny_models, tmp_path
):
    from safetensors.torch import load_file, save_file

    adapter = tiny_models.build_adapter(tiny_llava, tmp_path / "adapter", b_std=0.5)
    held = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(held.items())[3:]), adapter / "adapter_model.safetensors")
    settings = SampleSettings(model=str(tiny_llava), samples=2, max_new_tokens=6)
    with pytest.raises(
        UserError, match=r"--adapter: wanted an adapter of this model, got none in .*3 weights"
    ):
        load_sampler(settings, adapter=adapter).draw_batch(batch_of(questions, settings))


def test_the_weights_are_not_loaded_when_nothing_is_missing(questions, tmp_path, tiny_llava, monkeypatch):
    settings = SampleSettings(model=str(tiny_llava), samples=2, max_new_tokens=3)
    complete(questions, tmp_path / "c.jsonl", settings, load_sampler(settings), quiet=True)
    sampler = load_sampler(settings)
    monkeypatch.setattr(LocalSampler, "model", property(lambda self: pytest.fail("the model was loaded")))
    assert complete(questions, tmp_path / "c.jsonl", settings, sampler, quiet=True).drawn == 0


def test_a_damaged_image_fails_its_question_and_the_others_are_drawn(
    questions, tmp_path, tiny_llava, read_rows, monkeypatch
):
    settings = SampleSettings(model=str(tiny_llava), samples=2, max_new_tokens=5)
    whole = load_sampler(settings).draw_batch(batch_of(questions, settings))
    content = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(content[: len(content) // 2])
    result = complete(questions, tmp_path / "c.jsonl", settings, load_sampler(settings), quiet=True)
    assert (result.questions, result.failed) == (3, 0)
    assert result.account.dropped == {"questions": {"bad image": 1}}
    [told] = read_rows(tmp_path / "c.skipped.jsonl")
    assert told["where"].endswith("questions.jsonl line 2")
    assert told["detail"].startswith("2.png: cannot be decoded")
    texts = [row["text"] for row in read_rows(tmp_path / "c.jsonl") for _ in row["seeds"]]
    assert texts == [drawn.text.strip() for drawn in (*whole[:2], *whole[4:])]
    sampler = load_sampler(settings)  # a rerun has only that question open, and needs no model for it
    monkeypatch.setattr(LocalSampler, "model", property(lambda self: pytest.fail("the model was loaded")))
    again = complete(questions, tmp_path / "c.jsonl", settings, sampler, quiet=True)
    assert (again.drawn, again.completions) == (0, result.completions)


def test_a_model_with_a_table_of_positions_fails_long_questions_alone_and_stops_samples_at_its_end(
    tmp_path, write_rows, read_rows, tiny_models, command
):
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny_models.build_tokenizer(tiny_models.CHATML, eos="<|im_end|>")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=40,
        bos_token_id=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    folder = tmp_path / "gpt2"
    tiny_models.draw_weights(GPT2LMHeadModel(config), 1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [
        {"id": "a", "question": "the chart?"},
        {"id": "b", "question": "red " * 60},
        {"id": "c", "question": "red?"},
    ]
    path, out = write_rows(tmp_path / "questions.jsonl", rows), tmp_path / "completions.jsonl"
    code, stdout, _ = command(
        "complete", path, "-o", out, "-m", folder, "--samples", 2, "--max-new-tokens", 100
    )
    assert code == 3
    assert "dropped        2  refused_request" in stdout
    skipped = read_rows(tmp_path / "completions.skipped.jsonl")
    assert all("wanted fewer than the model's 40 positions, got" in row["detail"] for row in skipped)
    made = read_rows(out)
    assert {row["question_id"] for row in made} == {"a", "c"}
    assert any(row["finish_reason"] == "length" and 10 < row["tokens"] < 40 for row in made)
    # as far as it goes whatever stands beside it
    alone = tmp_path / "alone.jsonl"
    command("complete", write_rows(tmp_path / "one.jsonl", rows[2:]), "-o", alone, "-m", folder, "--samples", 2,
            "--max-new-tokens", 100)  # fmt: skip
    assert [row["text"] for row in read_rows(alone)] == [
        row["text"] for row in made if row["question_id"] == "c"
    ]


def test_a_conversation_that_the_template_refuses_fails_alone(
    tmp_path, write_rows, read_rows, tiny_models, command
):
    folder = tiny_models.build_text(tmp_path / "text")
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    path = next(folder.glob("chat_template.jinja"))
    path.write_text(refusing + path.read_text())
    rows = [
        {"id": "a", "question": "the chart?"},
        {"id": "b", "question": "red?", "history": [{"role": "system", "text": "the"}]},
    ]
    questions, out = write_rows(tmp_path / "questions.jsonl", rows), tmp_path / "completions.jsonl"
    code, _, stderr = command(
        "complete", questions, "-o", out, "-m", folder, "--samples", 2, "--max-new-tokens", 3
    )
    assert code == 3 and "Traceback" not in stderr
    assert {row["question_id"] for row in read_rows(out)} == {"a"}
    skipped = read_rows(tmp_path / "completions.skipped.jsonl")
    assert [row["reason"] for row in skipped] == 2 * ["refused_request"]
    assert "can render, got system, user (TemplateError: System role not supported)" in skipped[0]["detail"]
