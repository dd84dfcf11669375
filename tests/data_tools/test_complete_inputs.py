"""What a local model is given when it samples: all that its processor says, prompts that begin as asked, images as they are."""

import io
import itertools
import json
import struct

import numpy as np
import pytest
from PIL import Image

from fasttrain_data.completions.local import gumbel_sampler, load_sampler, version_of
from fasttrain_data.completions.samples import SampleSettings, messages_of, samples_of
from fasttrain_data.image_files import BadImage, read_image
from fasttrain_data.records import Question


@pytest.fixture
def questions(tmp_path, write_rows, tiny_models):
    """A questions file with two images of different sizes."""
    names = [tiny_models.draw_image(tmp_path / f"{n}.png", n).name for n in (1, 2)]
    asked = (
        "what is the value of the red bar?",
        "how many?",
        "and the left bar between the bars in this chart?",
    )
    rows = [
        {"id": text, "images": [names[number % 2]], "question": text} for number, text in enumerate(asked)
    ]
    return write_rows(tmp_path / "questions.jsonl", rows)


def batch_of(questions, settings):
    rows = [Question.model_validate_json(line) for line in questions.read_text().splitlines()]
    images = [tuple(read_image(questions.parent / name) for name in row.images) for row in rows]
    return [samples_of(row, image, settings, "v") for row, image in zip(rows, images, strict=True)]


@pytest.mark.parametrize("family", ["Gemma 3", "Qwen2.5-VL", "LLaVA-NeXT", "Idefics3"])
def test_other_families_sample_what_generate_gives_with_all_that_the_processor_says(
    family, questions, tmp_path, tiny_models, tiny_families
):
    with questions.open("a") as file:
        file.write(json.dumps({"id": "qd", "question": "a question without an image?"}) + "\n")
    folder = tiny_families.save(tiny_models, tmp_path / "model", family)
    settings = SampleSettings(model=str(folder), samples=2, temperature=0.9, max_new_tokens=6)
    sampler = load_sampler(settings)
    batch = batch_of(questions, settings)
    drawn = sampler.draw_batch(batch)
    for sample, result in zip(itertools.chain(*batch), drawn, strict=True):
        messages = messages_of(sample.question, len(sample.images))
        text = sampler.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        images = [Image.open(io.BytesIO(image.content)).convert("RGB") for image in sample.images]
        inputs = sampler.processor(
            text=[text], images=images or None, return_tensors="pt", add_special_tokens=False
        )
        noise = gumbel_sampler([sample.seed], 0.9, 1.0, "cpu")
        output = sampler.model.generate(**inputs, max_new_tokens=6, do_sample=False, logits_processor=[noise])
        new = output[0, inputs["input_ids"].shape[1] :]
        assert result.text == sampler.tokenizer.decode(new, skip_special_tokens=True)
    assert len({result.text for result in drawn}) == 8


@pytest.fixture
def llava_that_begins(tiny_models, tmp_path, monkeypatch):
    """A LLaVA whose tokenizer puts <s> in front of a text, and whose template does not."""
    tiny_models.let_tokenizers_begin(monkeypatch)
    folder = tmp_path / "begins"
    tiny_models.build_llava(folder, template=tiny_models.CHATML)
    return folder


@pytest.mark.parametrize("bos", ["template", "tokenizer"])
def test_prompts_begin_as_those_of_training(bos, questions, llava_that_begins):
    from fasttrain.data.pairs import IMAGE
    from fasttrain.data.tokens import ChatTokenizer

    settings = SampleSettings(model=str(llava_that_begins), samples=1, max_new_tokens=2, bos=bos)
    sampler = load_sampler(settings)
    seen = []
    sampler.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["input_ids"], kwargs["attention_mask"])),
        with_kwargs=True,
    )
    batch = batch_of(questions, settings)[:2]
    sampler.draw_batch(batch)
    chat = ChatTokenizer(sampler.processor, [sampler.tokenizer.eos_token_id], bos)
    for (sample,), ids, mask in zip(batch, *seen[0], strict=True):
        turn = ("user", (IMAGE, ("text", sample.question.question)))
        truth = chat.prompt((turn,), "x").ids.tolist()
        assert ids[mask.bool()].tolist() == truth[:-1]
        assert (truth[0] == sampler.tokenizer.bos_token_id) == (bos == "tokenizer")


def test_samples_with_another_beginning_are_drawn_anew_and_the_default_is_told(
    questions, tmp_path, command, llava_that_begins, tiny_models, read_rows
):
    def run(*options, out="c.jsonl"):
        return command(
            "complete", questions, "-o", tmp_path / out, "-m", llava_that_begins, "--samples", "1",
            "--max-new-tokens", "3", *options,
        )  # fmt: skip

    code, stdout, stderr = run()
    assert (code, "3 drawn now" in stdout) == (0, True)
    assert "note: the chat template writes no <s>" in stderr and "as --bos tokenizer does here" in stderr
    first = {row["prompt_hash"] for row in read_rows(tmp_path / "c.jsonl")}
    assert "0 drawn now" in run("--bos", "template")[1]
    code, stdout, stderr = run("--bos", "tokenizer")
    assert (code, "3 drawn now" in stdout, "note: the chat" in stderr) == (0, True, False)
    assert first.isdisjoint(row["prompt_hash"] for row in read_rows(tmp_path / "c.jsonl"))
    # an adapter of a run that began its prompts so
    final = tiny_models.build_adapter(llava_that_begins, tmp_path / "run" / "final")
    (tmp_path / "run" / "config.yaml").write_text("model: {name: m, bos: tokenizer}\n")
    assert "note: the chat" not in run("-a", final, out="d.jsonl")[2]
    assert "3 drawn now" in run("-a", final, "--bos", "template", out="d.jsonl")[1]
    code, _, stderr = run("--bos", "template", "--server", "http://127.0.0.1:1")
    assert (code, "--bos: wanted with a local model only" in stderr) == (2, True)


def test_greys_of_16_bits_are_seen_as_greys(questions, tmp_path, tiny_llava):
    settings = SampleSettings(model=str(tiny_llava), samples=1, max_new_tokens=8)
    sampler = load_sampler(settings)
    grey = np.arange(28 * 28).reshape(28, 28) % 200 + 40
    drawn = []
    for picture in (grey.astype(np.uint8), (grey * 257).astype(np.uint16), np.full((28, 28), 255, np.uint8)):
        Image.fromarray(picture).save(tmp_path / "1.png")
        drawn.append(sampler.draw_batch(batch_of(questions, settings)[:1])[0].text)
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_image_on_which_pillow_fails_in_a_way_of_its_own_is_a_bad_image(tmp_path, monkeypatch):
    def fail(file, formats):
        raise struct.error("unpack requires a buffer of 2 bytes")

    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", exif=b"II*\0")
    assert read_image(tmp_path / "x.png").mime_type == "image/png"  # nobody asks how it lies
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(BadImage, match=r"x\.png: broken image: unpack requires a buffer of 2 bytes"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("size", "kind", "wanted"),
    [
        ((8, 8), "EPS", "not a file of type PNG, JPEG"),
        ((401, 2), "PNG", "one side more than 200 times the other"),
    ],
)
def test_an_image_that_training_would_refuse_is_refused_here(tmp_path, size, kind, wanted):
    Image.new("RGB", size).save(tmp_path / "x.img", kind)
    with pytest.raises(BadImage, match=wanted):
        read_image(tmp_path / "x.img")


def test_a_model_trained_again_into_its_folder_is_another_model(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"before")
    before = version_of(tmp_path, None)
    assert version_of(tmp_path, None) == before
    weights.write_bytes(b"after.")
    assert version_of(tmp_path, None) != before


def test_samples_of_another_template_are_other_samples(questions):
    question = Question.model_validate_json(questions.read_text().splitlines()[0])
    settings = SampleSettings(model="m", samples=1)
    keys = {samples_of(question, (), settings, "v", template)[0].key for template in (None, "a", "b")}
    assert len(keys) == 3
