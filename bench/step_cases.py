"""What step.py times: a model, and pairs with answers of exactly so many tokens, written as an ordinary pair file."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

QUESTION_TOKENS = 40  # of text, beside the image

# Newlines stand before turns, not behind them: TRL scores what a template writes behind the end-of-turn token, we do not,
# and the contenders are to compute the same loss.
TEMPLATE = (
    "{% for message in messages %}{{ '' if loop.first else '\n' }}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)

Answers = list[list[int]]  # tokens of every answer (its end-of-turn token included), by prompt


@dataclass(frozen=True)
class Case:
    """Pairs of one step. Of every prompt's answers the first is chosen against each of the others."""

    name: str
    model: str
    answers: Answers
    prompt_tokens: int = QUESTION_TOKENS  # of text, the image's 576 not counted
    about: str = ""
    one_image: bool = False  # all prompts are questions about one, and fasttrain groups them by it

    @property
    def has_images(self) -> bool:
        return self.model.endswith("llava")

    @property
    def pairs(self) -> int:
        return sum(len(lengths) - 1 for lengths in self.answers)

    @property
    def groups(self) -> list[int]:
        """Tokens of every group's prompt with its answers, the prompt once, without what the chat template adds."""
        image = 576 if self.has_images else 0
        if self.one_image:
            return [image + sum(len(lengths) * self.prompt_tokens + sum(lengths) for lengths in self.answers)]
        return [image + self.prompt_tokens + sum(lengths) for lengths in self.answers]


CASES = {
    case.name: case
    for case in (
        Case("vlm-60", "smollm2-llava", [[60, 60]], about="1:1, image, answers of 60 tokens"),
        Case("vlm-130", "smollm2-llava", [[130, 130]], about="1:1, image, answers of 130 tokens"),
        Case("vlm-300", "smollm2-llava", [[300, 300]], about="1:1, image, answers of 300 tokens"),
        Case("vlm-4x3", "smollm2-llava", [[130] * 4], about="four answers, three pairs, image, 130 tokens"),
        Case("vlm-4q", "smollm2-llava", [[130, 130]] * 4, about="four questions about one image, 1:1, 130 tokens", one_image=True),
        Case("text-512", "smollm2", [[128, 128]], 512, about="1:1, text, prompt 512, answers of 128 tokens"),
        Case("ladder", "smollm2-llava", [[60, 200], [130, 130]], about="two pairs, image, answers of 60 to 200"),
        Case("tiny", "smollm2", [[9, 14], [6, 5, 8]], 12, about="a few tokens, to try the bench itself"),
    )
}  # fmt: skip


def write_model(model: Path, folder: Path) -> Path:
    """The same model with `TEMPLATE`: links to its files."""
    if not (model / "model.safetensors").exists():
        raise SystemExit(f"no model in {model}: python bench/models.py {model.name} -o {model}")
    folder.mkdir()
    for path in model.resolve().iterdir():
        if path.name != "chat_template.jinja":
            (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def write_case(case: Case, model: Path, folder: Path, seed: int = 0) -> Path:
    """The case's pair file in `folder`, with its images; token counts are checked against the model's tokenizer."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for group, lengths in enumerate(case.answers):
        prompt: Any = _text(model, case.prompt_tokens, rng)
        row: dict[str, Any] = {}
        if case.has_images:
            row["images"] = ["0.png"] if case.one_image and group else [_draw(folder, group, rng)]
            prompt = [{"type": "image"}, {"type": "text", "text": prompt}]
        chosen, *others = [_text(model, length - 1, rng) for length in lengths]
        row |= {"prompt": [{"role": "user", "content": prompt}], "chosen": _said(chosen)}
        rows += [row | {"rejected": _said(other)} for other in others]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def _draw(folder: Path, number: int, rng: random.Random) -> str:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (640, 480), tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        x, y = rng.randrange(600), rng.randrange(440)
        draw.rectangle((x, y, x + rng.randrange(5, 200), y + rng.randrange(5, 200)),
                       fill=tuple(rng.randrange(256) for _ in range(3)))  # fmt: skip
    image.save(folder / f"{number}.png")
    return f"{number}.png"


def _text(model: Path, tokens: int, rng: random.Random) -> str:
    """Words that are one token each: their number is the number of tokens, however they are put together."""
    words = _words(model)
    text = " ".join(rng.choice(words) for _ in range(tokens))
    found = len(_tokenizer(model)(text, add_special_tokens=False)["input_ids"])
    if found != tokens:
        raise AssertionError(f"wanted {tokens} tokens, got {found}: {text!r}")
    return text


@cache
def _tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@cache
def _words(model: Path) -> tuple[str, ...]:
    tokenizer = _tokenizer(model)
    found = []
    for number in range(1000, 12000):
        word = tokenizer.decode([number])
        bare = word.strip()
        single = len(tokenizer(bare, add_special_tokens=False)["input_ids"]) == 1
        if word.startswith(" ") and bare.isalpha() and bare.isascii() and bare.islower() and single:
            found.append(bare)
    return tuple(found)


def write_adapter(model: Path, folder: Path, rank: int, seed: int = 1) -> Path:
    """LoRA weights by name (safetensors), B not zero: policy and reference differ, so losses are worth comparing."""
    import torch
    from safetensors.torch import save_file

    from fasttrain.config import config_from_dict
    from fasttrain.devices import pick_device
    from fasttrain.model.folder import find_folder
    from fasttrain.model.load import load_model, load_model_config
    from fasttrain.model.lora import language_model

    config = config_from_dict(recipe(model, Path("none"), folder, rank, batch=1)).model
    found = find_folder(config)
    loaded = load_model(found, config, load_model_config(found, config), pick_device())
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in language_model(loaded).named_modules():
        if isinstance(module, torch.nn.Linear):
            a = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            b = torch.randn(module.out_features, rank, generator=generator) * 2e-3
            tensors |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
    path = folder / "adapter.safetensors"
    save_file(tensors, path)
    return path


def recipe(model: Path, pairs: Path, output: Path, rank: int, batch: int, longest: int = 0) -> dict[str, Any]:
    """fasttrain's recipe for a case whose longest group has `longest` tokens and its template's; what is not here is its default."""
    return {
        "model": {"name": str(model), "dtype": "float32"},
        "lora": {"rank": rank, "alpha": 2 * rank},
        "data": {"train": str(pairs), "workers": 0, "max_length": 8192},
        "loss": {"beta": BETA},
        "train": {
            "output": str(output / "run"), "pairs_per_step": batch, "learning_rate": LEARNING_RATE,
            "gradient_checkpointing": False, "tokens_per_pack": max(4096, longest + TEMPLATE_TOKENS), "shuffle": False,
        },
        "track": [],
    }  # fmt: skip


BETA = 0.1
TEMPLATE_TOKENS = 64  # more than the models' chat templates add to a prompt
LEARNING_RATE = 1e-6
