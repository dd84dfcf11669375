"""The demo's model from scratch: LLaVA-1.5's architecture and template at a thousandth of its size."""

import itertools

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fasttrain.demo.charts import IMAGE_SIZE, KINDS, examples

PATCH_SIZE = 8
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")

# A word, a digit or a mark, each with the space before it ("▁" after normalisation); else a single character.
TOKEN_PATTERN = r"▁?[A-Za-z]+|▁?[0-9]|▁?[^\sA-Za-z0-9▁]|▁|\s"

# Vicuna's turns as LLaVA-1.5 writes them, without its system line: the images of a turn come before its text.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '' }}{% else %}{{ message['role'] | upper }}: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over every word the charts use; decoding known words gives the text back exactly.

    Words outside the vocabulary become `<unk>`. It adds no tokens of its own: the template writes `<s>` and `</s>`.
    """
    splitter = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated")
    pieces = {
        piece for text in _all_texts() for piece, _ in splitter.pre_tokenize_str(text.replace(" ", "▁"))
    }
    vocabulary = {piece: i for i, piece in enumerate((*SPECIAL_TOKENS, *sorted(pieces)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """CLIP's image processing at the demo's size (by PIL, without torchvision), the tokenizer and the template."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int = 128) -> LlavaForConditionalGeneration:
    """A randomly initialised LLaVA: a CLIP tower and a Llama decoder of three layers each, float32.

    As in LLaVA-1.5 the features come from the tower's last layer but one, without the class token.
    """
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=hidden,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def _all_texts() -> list[str]:
    """Texts that hold every piece the template, the questions and the answers can be split into."""
    shown = itertools.islice(examples(0, "train"), 200 * len(KINDS))
    questions = [example.question for example in shown]
    said = {text for q in questions for text in (q.text, q.answer, q.habit, *q.wrong)} | {
        "USER: ",
        "ASSISTANT: ",
    }
    return ["\n", *said, *(f" {text}" for text in said)]
