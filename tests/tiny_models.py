"""Builds the tests' models and pair files: random weights, real architectures, below 1 MB each.

Weights are drawn several times wider than a fresh model's, so that log-probs differ from token to token and
a wrong position, mask or image changes every number a test compares.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VOCABULARY = """
the a bar line chart shows value of red green blue left right highest lowest is are not because answer image
question picture describe how many what which color between and 1 2 3 7 15 42 percent yes no larger smaller than
"""
WORDS = VOCABULARY.split()

# As SmolLM2's: the end-of-turn token is eos, and the template writes a newline after it.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The same, but the newline opens the next turn: nothing follows the end-of-turn token.
CHATML_NEWLINE_FIRST = (
    "{% for message in messages %}{{ '' if loop.first else '\n' }}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)

# Vicuna's roles as LLaVA-1.5 uses them: images first, "USER: ... ASSISTANT: ...</s>".
VICUNA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{{ ' ' }}"
    "{% else %}{{ 'USER:' if message['role'] == 'user' else 'ASSISTANT:' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ ' <image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ ' ' + part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{{ ' ' if message['role'] == 'user' else eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_tokenizer(template: str, eos: str, vocab_size: int = 320) -> Any:
    """A byte-level BPE tokenizer, trained on `WORDS`, with a chat template, a pad token and `<image>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((sentence(random.Random(seed), 12) for seed in range(200)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<image>"],
        chat_template=template,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def let_tokenizers_begin(monkeypatch: Any) -> None:
    """From here on tokenizers that are built put <s> in front of a text, as Llama's do."""
    import sys

    from tokenizers.processors import TemplateProcessing

    build = build_tokenizer

    def adds_bos(*given: Any, **named: Any) -> Any:
        tokenizer = build(*given, **named)
        front = [("<s>", tokenizer.bos_token_id)]
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=front)
        return tokenizer

    monkeypatch.setattr(sys.modules[__name__], "build_tokenizer", adds_bos)


def draw_weights(model: Any, seed: int, std: float = 0.15) -> Any:
    """Fill every parameter from one generator: matrices N(0, std), norm weights about 1, biases small."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(std * noise)
            elif "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.05 * noise)
    return model.eval()


def language_config(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        **changes,
    }


def build_text(folder: Path, seed: int = 1, template: str = CHATML, **changes: Any) -> Path:
    """A two-layer Llama (grouped-query attention) with a ChatML tokenizer, saved in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(template, eos="<|im_end|>")
    config = LlamaConfig(**language_config(tokenizer, **changes))
    draw_weights(LlamaForCausalLM(config), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_mixture(folder: Path, seed: int = 6, template: str = CHATML, experts: int = 5) -> Path:
    """A two-layer Mixtral: every token goes to two of a layer's experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    tokenizer = build_tokenizer(template, eos="<|im_end|>")
    config = MixtralConfig(**language_config(tokenizer, num_local_experts=experts))
    draw_weights(MixtralForCausalLM(config), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_mistral_sliding(folder: Path, seed: int = 2, window: int = 16) -> Path:
    """A two-layer Mistral whose attention looks back `window` tokens, less than most prompts."""
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = build_tokenizer(CHATML, eos="<|im_end|>")
    config = MistralConfig(**language_config(tokenizer, sliding_window=window))
    draw_weights(MistralForCausalLM(config), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_llava(folder: Path, seed: int = 3, template: str = VICUNA, **changes: Any) -> Path:
    """A LLaVA: three-layer CLIP tower (28 px, patch 7: 16 image tokens, layer -2), projector, Llama."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor
    from transformers import LlavaForConditionalGeneration as Llava
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = build_tokenizer(template, eos="</s>")
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**language_config(tokenizer, **changes)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    draw_weights(Llava(config), seed).save_pretrained(folder)
    # The PIL processor, because the default one needs torchvision.
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def build_adapter(base: Path, folder: Path, *, seed: int = 4, rank: int = 4, b_std: float = 0.0) -> Path:
    """A LoRA adapter on every linear of the language model, saved by peft; B is N(0, b_std)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    has_images = hasattr(AutoConfig.from_pretrained(base), "vision_config")
    auto = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    names = "[qkvo]_proj|gate_proj|up_proj|down_proj"
    # Idefics3 calls its decoder text_model, as it calls nothing else
    targets = rf".*(language_model|model\.text_model).*\.({names})" if has_images else rf".*\.({names})"
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(auto.from_pretrained(base, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif "lora_B" in name:
                parameter.copy_(b_std * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def _answer_pairs(rng: random.Random, count: int, longest: int) -> list[tuple[str, str]]:
    """`count` (chosen, rejected) of one prompt; from three on, the second is both rejected and chosen."""
    answers: list[str] = []
    while len(answers) < max(2, count + 1 if count < 3 else count):
        answer = sentence(rng, rng.randint(1, longest))
        if answer not in answers:
            answers.append(answer)
    if count < 3:
        return [(answers[0], rejected) for rejected in answers[1 : count + 1]]
    return [*((answers[0], rejected) for rejected in answers[1:]), (answers[1], answers[2])]


def _prompt_messages(rng: random.Random, images: int, turns: int) -> list[dict[str, Any]]:
    """User and assistant turns, the user's last; the images are spread evenly over the user's turns."""
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        share = images // turns + (turn < images % turns)
        question = {"type": "text", "text": sentence(rng, rng.randint(3, 9)) + "?"}
        messages.append({"role": "user", "content": [{"type": "image"}] * share + [question]})
        if turn + 1 < turns:
            answer = [{"type": "text", "text": sentence(rng, rng.randint(2, 6))}]
            messages.append({"role": "assistant", "content": answer})
    return messages


def draw_image(path: Path, seed: int) -> Path:
    """A PNG of coloured rectangles; its size, odd and not square, also comes from the seed."""
    from PIL import Image, ImageDraw

    rng = random.Random(seed)
    width, height = rng.randint(20, 60), rng.randint(20, 60)
    image = Image.new("RGB", (width, height), tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        left, top = rng.randrange(width - 4), rng.randrange(height - 4)
        right, bottom = rng.randint(left + 2, width), rng.randint(top + 2, height)
        draw.rectangle((left, top, right, bottom), fill=tuple(rng.randrange(256) for _ in range(3)))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def text_pairs(
    path: Path,
    count: int,
    *,
    seed: int = 0,
    per_prompt: Sequence[int] = (1, 3, 2),
    turns: Sequence[int] = (1, 2),
    longest: int = 12,
    short: bool = False,
) -> Path:
    """Write `count` text rows as JSON lines.

    per_prompt, turns: cycled over the prompts; rows of one prompt (they stand together), its user turns.
    longest: most words in an answer. short: prompt, chosen and rejected as plain strings (one turn).
    """
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    cycles = zip(itertools.cycle(per_prompt), itertools.cycle(turns), strict=False)
    for group, (size, turn_count) in enumerate(cycles):
        if len(rows) >= count:
            return write_rows(path, rows[:count])
        prompt: Any = sentence(rng, 6) + "?" if short else _prompt_messages(rng, 0, turn_count)
        for chosen, rejected in _answer_pairs(rng, size, longest):
            rows.append(_row(f"t{group}", len(rows), prompt, chosen, rejected, short))
    raise AssertionError("cycles do not end")


def vision_pairs(
    folder: Path,
    count: int,
    *,
    seed: int = 0,
    per_prompt: Sequence[int] = (1, 3, 2),
    images: Sequence[int] = (1, 0, 1, 2),
    turns: Sequence[int] = (1, 1, 2),
    pool: int | None = None,
    longest: int = 12,
    short: bool = False,
) -> Path:
    """Draw images into `folder`/images and write `count` rows as `folder`/pairs.jsonl; returns that file.

    per_prompt, images, turns: cycled over the prompts; 0 images is a text-only row (it has no `images` key).
    pool: number of different image files; by default every use has its own. Paths are relative to `folder`.
    """
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    used = itertools.count()
    cycles = zip(*(itertools.cycle(values) for values in (per_prompt, images, turns)), strict=False)
    for group, (size, image_count, turn_count) in enumerate(cycles):
        if len(rows) >= count:
            return write_rows(folder / "pairs.jsonl", rows[:count])
        numbers = [number % pool if pool else number for number in itertools.islice(used, image_count)]
        names = [f"images/{number}.png" for number in numbers]
        for name, number in zip(names, numbers, strict=True):
            if not (folder / name).exists():
                draw_image(folder / name, seed=1000 * seed + number)
        prompt: Any = sentence(rng, 6) + "?" if short else _prompt_messages(rng, image_count, turn_count)
        for chosen, rejected in _answer_pairs(rng, size, longest):
            row = _row(f"v{group}", len(rows), prompt, chosen, rejected, short)
            rows.append({**row, "images": names} if names else row)
    raise AssertionError("cycles do not end")


def _row(group: str, number: int, prompt: Any, chosen: str, rejected: str, short: bool) -> dict[str, Any]:
    if short:
        return {"id": f"{group}-{number}", "prompt": prompt, "chosen": chosen, "rejected": rejected}

    def turn(text: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]

    return {"id": f"{group}-{number}", "prompt": prompt, "chosen": turn(chosen), "rejected": turn(rejected)}
