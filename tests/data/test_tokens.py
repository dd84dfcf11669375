"""Token ids: the processor's own for prompts and images, and a completion that ends with its end-of-turn token."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fasttrain.data.bad_row import BadRow
from fasttrain.data.pairs import IMAGE, Message
from fasttrain.data.token_bounds import TokenBounds
from fasttrain.data.tokens import ChatTokenizer
from fasttrain.errors import UserError

# As llava-hf/llava-1.5-7b-hf has it: no BOS, "ROLE: " before a turn, a space and nothing else behind an answer.
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}"
    "{% endif %}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Joins content to strings, as older templates do: a list of parts is a TypeError.
STRINGS_ONLY = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
# Prints content as it is: a list of parts would appear as Python writes it.
PRINTS = STRINGS_ONLY.replace(
    "'[' + m['role'] + '] ' + m['content'] + eos_token", "'[' ~ m['role'] ~ '] ' ~ m['content'] ~ eos_token"
)
# Trims what it is given, as Llama 3 does.
TRIMS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + (m['content'] | trim) + eos_token + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# Thinks first, as Qwen 3 does: something stands between the generation prompt and the answer.
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Forgets its own generation prompt.
CONTRADICTS = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)


@pytest.fixture
def vision_chat(tiny_models: ModuleType) -> Callable[..., ChatTokenizer]:
    """A chat tokenizer of a LLaVA (28 px, patch 7: 16 image tokens) with a template."""

    def build(template: str | None = None, strategy: str = "default") -> ChatTokenizer:
        from transformers import LlavaProcessor
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        tokenizer = tiny_models.build_tokenizer(template or tiny_models.VICUNA, eos="</s>")
        pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        processor = LlavaProcessor(
            image_processor=pixels, tokenizer=tokenizer, patch_size=7, num_additional_image_tokens=1,
            vision_feature_select_strategy=strategy, chat_template=template or tiny_models.VICUNA,
        )  # fmt: skip
        return ChatTokenizer(processor, [tokenizer.eos_token_id])

    return build


def user(*parts: Any, role: str = "user") -> Message:
    return role, tuple(IMAGE if part == IMAGE else ("text", part) for part in parts)


QUESTION = (user("what is it?"),)
CONVERSATION = (
    user("be brief", role="system"),
    user(IMAGE, "what is it?"),
    user("a bar", role="assistant"),
    user("and this?", IMAGE),
)


def scored(chat: ChatTokenizer, answer: str, messages: tuple[Message, ...] = QUESTION) -> str:
    """The scored tokens of an answer, as text."""
    prompt = chat.prompt(messages, "p.jsonl line 1")
    return chat.tokenizer.decode(chat.completion(messages, prompt, answer, "p.jsonl line 1").tolist())


ANSWERS = [
    "a red bar",
    "no",
    "s",
    "/",
    "<",
    "e",
    "end",
    "im_end",
    "|",
    "think",
    "1 2\n3",
    "ü 漢 🙂",
    "USER: no",
    "what is it?",
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_is_scored_to_its_end_of_turn_token_and_no_further(
    answer: str, text_chat: Any, vision_chat: Any, tiny_models: ModuleType
) -> None:
    # Behind the answer ChatML writes a newline, TRIMS two, LLAVA_HF a space: none of it is scored.
    assert scored(text_chat(), answer) == answer + "<|im_end|>"
    assert scored(text_chat(tiny_models.CHATML_NEWLINE_FIRST), answer) == answer + "<|im_end|>"
    assert scored(text_chat(TRIMS), answer) == answer + "<|im_end|>"
    assert scored(text_chat(THINKS), answer) == "<think>\n\n</think>\n\n" + answer + "<|im_end|>"
    assert scored(vision_chat(), answer) == " " + answer + "</s>"


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_template_without_end_of_turn_token_gets_eos(answer: str, vision_chat: Any) -> None:
    chat = vision_chat(LLAVA_HF)
    assert scored(chat, answer) == " " + answer + "</s>"
    assert chat.appended_end == 1


def test_a_template_with_an_end_of_turn_token_gets_none_added(vision_chat: Any, text_chat: Any) -> None:
    for chat in (vision_chat(), text_chat(), text_chat(TRIMS)):
        scored(chat, "a bar")
        assert chat.appended_end == 0


@pytest.mark.parametrize("answer", ["  a bar", "a bar \n\n", "\n\na bar\n", " s "])
def test_white_space_of_an_answer_is_kept_or_trimmed_as_the_template_does(
    answer: str, text_chat: Any, vision_chat: Any
) -> None:
    assert scored(text_chat(), answer) == answer + "<|im_end|>"
    assert scored(text_chat(TRIMS), answer) == answer.strip() + "<|im_end|>"
    assert scored(vision_chat(), answer) == " " + answer + "</s>"
    assert scored(vision_chat(LLAVA_HF), answer) == " " + answer.rstrip() + "</s>"


def test_the_end_is_the_first_of_several_end_tokens(tiny_models: ModuleType) -> None:
    template = TRIMS.replace("eos_token", "'<|im_end|>' + eos_token")
    tokenizer = tiny_models.build_tokenizer(template, eos="</s>")
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert scored(ChatTokenizer(tokenizer, ends), "a bar") == "a bar<|im_end|>"
    assert scored(ChatTokenizer(tokenizer, ends[:1]), "a bar") == "a bar<|im_end|></s>"


def test_the_end_is_the_templates_own_where_the_model_stops_at_another_token(tiny_models: ModuleType) -> None:
    # as Gemma 1's and many ChatML models whose configuration kept the base model's eos
    tokenizer = tiny_models.build_tokenizer(TRIMS.replace("eos_token", "'<|im_end|>'"), eos="</s>")
    chat = ChatTokenizer(tokenizer, [tokenizer.eos_token_id])
    assert scored(chat, "a bar") == "a bar<|im_end|>"
    assert (chat.own_end, chat.appended_end) == (["<|im_end|>"], 0)
    with pytest.raises(BadRow, match=r"wanted no end-of-turn token, .* got <\|im_end\|> in the text"):
        scored(chat, "a <|im_end|> bar")


def test_an_answer_that_was_written_with_its_end_token_has_it_once(vision_chat: Any) -> None:
    chat = vision_chat()
    assert scored(chat, "a bar</s>") == scored(chat, "a bar")
    with pytest.raises(BadRow, match="line 1: answer: wanted a non-empty answer"):
        scored(chat, "</s>")


@pytest.mark.parametrize("answer", ["</s>a bar", "a </s> bar"])
def test_an_answer_that_holds_the_end_of_turn_token_is_refused(answer: str, vision_chat: Any) -> None:
    with pytest.raises(BadRow, match=r"line 1: answer: wanted no end-of-turn token, .* got </s> in the text"):
        scored(vision_chat(), answer)


def test_an_answer_that_holds_the_image_token_is_refused(vision_chat: Any) -> None:
    with pytest.raises(BadRow, match="answer: wanted no image placeholder, got <image> in the text"):
        scored(vision_chat(), "see <image>")


def test_a_template_that_only_the_tokenizer_has_is_told_apart_from_none(vision_chat: Any) -> None:
    processor = vision_chat().processor
    processor.chat_template = None
    with pytest.raises(
        UserError, match=r"got a processor without one \(its tokenizer has one, for text: put "
    ):
        ChatTokenizer(processor, [processor.tokenizer.eos_token_id])
    processor.tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"got a processor without one$"):
        ChatTokenizer(processor, [processor.tokenizer.eos_token_id])


def test_a_text_model_knows_no_image_token(text_chat: Any) -> None:
    assert scored(text_chat(), "the tag <image>") == "the tag <image><|im_end|>"


@pytest.mark.parametrize("template", ["VICUNA", "LLAVA_HF", "CHATML", "STRINGS_ONLY", "PRINTS"])
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize(
    "messages", [QUESTION, (user(IMAGE, "what is it?"),), (user("which?", IMAGE, IMAGE),), CONVERSATION]
)
def test_prompt_ids_are_the_processors_own(
    template: str, strategy: str, messages: tuple[Message, ...], vision_chat: Any, tiny_models: ModuleType
) -> None:
    from PIL import Image

    chat = vision_chat(globals().get(template) or getattr(tiny_models, template), strategy)
    prompt = chat.prompt(messages, "x")
    images = sum(part == IMAGE for _, parts in messages for part in parts)
    pictures = [Image.new("RGB", (40 + 9 * n, 23)) for n in range(images)]
    truth = chat.processor(text=prompt.text, images=pictures or None, add_special_tokens=False)["input_ids"][
        0
    ]
    assert prompt.ids.tolist() == truth
    assert (prompt.ids == chat.image_token_id).sum() == images * (16 if strategy == "default" else 17)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("VICUNA", "<s>be brief USER: <image>\n what is it? ASSISTANT: a bar</s>USER: <image>\n and this? ASSISTANT:"),
        ("LLAVA_HF", "be brief USER: <image>\nwhat is it? ASSISTANT: a bar USER: <image>\nand this? ASSISTANT:"),
        ("PRINTS", "<s>[system] be brief</s>[user] <image>\nwhat is it?</s>[assistant] a bar</s>[user] and this?<image>\n</s>[assistant] "),
        ("STRINGS_ONLY", "<s>[system] be brief</s>[user] <image>\nwhat is it?</s>[assistant] a bar</s>[user] and this?<image>\n</s>[assistant] "),
    ],
)  # fmt: skip
def test_a_conversation_is_rendered_as_its_template_says(
    template: str, text: str, vision_chat: Any, tiny_models: ModuleType
) -> None:
    chat = vision_chat(globals().get(template) or getattr(tiny_models, template))
    assert chat.prompt(CONVERSATION, "x").text == text


def test_no_bos_is_added_beyond_the_template(text_chat: Any, vision_chat: Any) -> None:
    bos = vision_chat().tokenizer.bos_token_id
    assert vision_chat().prompt(QUESTION, "x").ids.tolist().count(bos) == 1  # VICUNA writes it
    assert bos not in vision_chat(LLAVA_HF).prompt(QUESTION, "x").ids
    assert bos not in text_chat().prompt(QUESTION, "x").ids


@pytest.fixture
def llama_like(tiny_models: ModuleType) -> Callable[[str], Any]:
    """A LLaVA processor with what Llama's tokenizer does: <s> in front of a text, and a space before its first word."""

    def build(template: str) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
        from transformers import LlavaProcessor, PreTrainedTokenizerFast
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        made = Tokenizer(models.BPE(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
        words = ["USER: what is it ? ASSISTANT: a bar be brief and this " * 3] * 20
        made.train_from_iterator(
            words, trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
        )
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
            additional_special_tokens=["<image>"],
        )  # fmt: skip
        pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        return LlavaProcessor(
            image_processor=pixels, tokenizer=tokenizer, patch_size=7, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=template,
        )  # fmt: skip

    return build


@pytest.mark.parametrize("template", ["LLAVA_HF", "VICUNA"])
@pytest.mark.parametrize("messages", [QUESTION, (user(IMAGE, "what is it?"),), CONVERSATION])
def test_bos_of_the_tokenizer_gives_the_ids_of_transformers_own_chat_path(
    template: str, messages: tuple[Message, ...], llama_like: Callable[[str], Any], tiny_models: ModuleType
) -> None:
    from PIL import Image

    processor = llama_like(globals().get(template) or getattr(tiny_models, template))
    chat = ChatTokenizer(processor, [2], bos="tokenizer")
    prompt = chat.prompt(messages, "x")
    spoken = [
        {
            "role": role,
            "content": [
                {"type": "image", "image": Image.new("RGB", (30, 30))} if part == IMAGE else {"type": "text", "text": part[1]}
                for part in parts
            ],
        }
        for role, parts in messages
    ]  # fmt: skip
    truth = processor.apply_chat_template(spoken, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert prompt.ids.tolist() == list(truth["input_ids"][0])
    assert prompt.ids[0] == 1 and prompt.ids.tolist().count(1) == 1
    # the answer goes on from there, as it does without
    answer = chat.completion(messages, prompt, "a bar", "x")
    plain = ChatTokenizer(processor, [2])
    assert answer.tolist() == plain.completion(messages, plain.prompt(messages, "x"), "a bar", "x").tolist()


def test_what_the_template_leaves_out_is_told(
    llama_like: Callable[[str], Any], tiny_models: ModuleType
) -> None:
    silent, writes = llama_like(LLAVA_HF), llama_like(tiny_models.VICUNA)
    chat = ChatTokenizer(silent, [2])
    assert chat.leaves_out_bos() and 1 not in chat.prompt(QUESTION, "x").ids
    assert not ChatTokenizer(silent, [2], bos="tokenizer").leaves_out_bos()
    assert not ChatTokenizer(writes, [2]).leaves_out_bos()
    silent.tokenizer._tokenizer.post_processor = None  # a tokenizer that puts nothing in front
    assert not ChatTokenizer(silent, [2]).leaves_out_bos()
    assert 1 not in ChatTokenizer(silent, [2], bos="tokenizer").prompt(QUESTION, "x").ids


def test_prompt_and_completion_are_one_rendering_tokenized_together(
    vision_chat: Any, tiny_models: ModuleType
) -> None:
    chat = vision_chat()
    prompt = chat.prompt(CONVERSATION, "x")
    ids = chat.completion(CONVERSATION, prompt, "the red bar", "x")
    turns = [chat._message(message) for message in (*CONVERSATION, user("the red bar", role="assistant"))]
    whole = chat.processor.apply_chat_template(turns, tokenize=False)
    expanded = whole.replace("<image>", "<image>" * 16)
    assert [*prompt.ids, *ids] == chat.tokenizer(expanded, add_special_tokens=False)["input_ids"]
    assert prompt.ids.dtype == ids.dtype == np.int32


@pytest.mark.parametrize("puts_a_space_in_front", [False, True])
def test_an_answer_that_would_merge_with_the_prompt_is_tokenized_by_itself(
    puts_a_space_in_front: bool,
) -> None:
    # The prompt ends in a newline, the answer begins with one, and the tokenizer has a token for two newlines.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["Q", "A", ":", "\n", "x", "\n\n", "\n\n\n", "</s>", "\u2581", "a"]
    merges = [("\n", "\n"), ("\n\n", "\n")]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(letters)}, merges))
    tokenizer.decoder = decoders.Fuse()
    if puts_a_space_in_front:  # as Llama's do: of an answer that follows something it is no part
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    template = "{% for m in messages %}{{ ('Q:' if m['role'] == 'user' else 'A:\n') + m['content'] + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'A:\n' }}{% endif %}"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=template)
    chat = ChatTokenizer(fast, [fast.eos_token_id])
    messages = (user("x"),)
    prompt = chat.prompt(messages, "x")
    assert fast.convert_ids_to_tokens(prompt.ids.tolist())[-2:] == [":", "\n"]
    assert fast.convert_ids_to_tokens(chat.completion(messages, prompt, "x", "x").tolist()) == ["x", "</s>"]
    assert chat.split_boundary == 0
    itself = fast.convert_ids_to_tokens(chat.completion(messages, prompt, "\n\nx", "x").tolist())
    assert (itself, chat.split_boundary) == (["\n\n", "x", "</s>"], 1)


def test_the_text_of_a_prompt_may_not_hold_the_image_token(vision_chat: Any) -> None:
    with pytest.raises(
        BadRow, match=r"line 4: images: wanted 1 placeholder\(s\) in the rendered prompt, got 2"
    ):
        vision_chat().prompt((user(IMAGE, "what is <image>?"),), "p.jsonl line 4")
    with pytest.raises(BadRow, match=r"images: wanted 0 placeholder\(s\)"):
        vision_chat().prompt((user("what is <image>?"),), "x")


def test_a_template_that_renders_no_images_is_named(vision_chat: Any, tiny_models: ModuleType) -> None:
    chat = vision_chat(tiny_models.VICUNA.replace("' <image>\n'", "''"))
    with pytest.raises(BadRow, match="or the template renders no images"):
        chat.prompt((user(IMAGE, "what?"),), "x")


def test_a_text_model_refuses_an_image(text_chat: Any) -> None:
    with pytest.raises(
        BadRow,
        match=r"images: wanted a text-only row for a model that is run on text only \(docs/models.md\), got an image",
    ):
        text_chat().prompt((user(IMAGE, "what?"),), "x")


def test_a_role_that_the_template_refuses_is_named(text_chat: Any) -> None:
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TRIMS
    )
    with pytest.raises(BadRow, match=r"prompt: wanted roles .* got system, user \(.*no system role\)"):
        text_chat(strict).prompt((user("be brief", role="system"), *QUESTION), "x")


def test_a_template_may_want_a_system_turn(text_chat: Any, tiny_models: ModuleType) -> None:
    wants = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    chat = text_chat(wants + tiny_models.CHATML)
    messages = (user("be brief", role="system"), user("x"))
    assert chat.completion(messages, chat.prompt(messages, "x"), "a bar", "x").size
    with pytest.raises(BadRow, match=r"line 1: prompt: .* got user \(TemplateError: no system\)"):
        chat.prompt((user("x"),), "line 1")


def test_a_template_that_fails_in_whatever_way_is_named(text_chat: Any, tiny_models: ModuleType) -> None:
    with pytest.raises(BadRow, match=r"prompt: .* got user, assistant .ZeroDivisionError"):
        text_chat("{{ 1 // 0 }}" + tiny_models.CHATML)


def test_a_stop_token_that_the_tokenizer_lacks_ends_no_answer(tiny_models: ModuleType) -> None:
    tokenizer = tiny_models.build_tokenizer(tiny_models.CHATML, eos="<|im_end|>")
    chat = ChatTokenizer(tokenizer, [tokenizer.eos_token_id, 99999, -1])
    assert chat.end_tokens == ["<|im_end|>"]
    assert scored(chat, "a bar") == "a bar<|im_end|>"


def test_a_template_that_breaks_its_own_prompt_is_named(text_chat: Any) -> None:
    with pytest.raises(
        BadRow, match="prompt: wanted a chat template that continues its own generation prompt"
    ):
        scored(text_chat(CONTRADICTS), "a bar")


def test_a_template_that_ends_answers_in_several_ways_is_named(text_chat: Any) -> None:
    moody = TRIMS.replace("eos_token + '\n\n'", "('' if 'bar' in m['content'] else eos_token + '\n\n')")
    with pytest.raises(BadRow, match="answer: wanted a chat template that ends every answer alike"):
        scored(text_chat(moody), "a bar")


def test_models_that_cannot_chat_are_named(tiny_models: ModuleType, text_chat: Any) -> None:
    tokenizer = tiny_models.build_tokenizer(TRIMS, eos="</s>")
    with pytest.raises(UserError, match="wanted a tokenizer with an end-of-sequence token, got none"):
        ChatTokenizer(tokenizer, [])
    with pytest.raises(UserError, match="wanted a chat template that renders assistant turns"):
        text_chat("{% for m in messages %}{{ m['content'] if m['role'] == 'user' }}{% endfor %}")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="wanted a model with a chat template"):
        ChatTokenizer(tokenizer, [tokenizer.eos_token_id])


@pytest.mark.parametrize("vision", [False, True])
def test_a_template_that_writes_the_date_writes_one_date_for_good(
    vision: bool, text_chat: Any, vision_chat: Any, tiny_models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import chat_template_utils

    class Midnight(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2031, 5, 7, 23, 59)

    monkeypatch.setattr(chat_template_utils, "datetime", Midnight)
    build, plain = (vision_chat, tiny_models.VICUNA) if vision else (text_chat, tiny_models.CHATML)
    # as Llama 3.1's template asks for it
    template = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y %H') }}{% endif %}" + plain
    processor = build(template).processor
    ends = [build(template).tokenizer.eos_token_id]
    chat = ChatTokenizer(processor, ends, today=date(2026, 11, 26))
    assert chat.prompt(QUESTION, "x").text.startswith("26 Nov 2026 00")
    assert chat.written_date == "2026-11-26"
    assert "2031" not in chat.tokenizer.decode(
        chat.completion(QUESTION, chat.prompt(QUESTION, "x"), "a bar", "x")
    )
    TokenBounds(chat, 3000)  # else Unknown: what it traces is what is rendered
    assert ChatTokenizer(processor, ends).written_date == date.today().isoformat()
    assert build(plain).written_date is None


@pytest.mark.parametrize("sizes", [[(64, 48), (37, 123)], [(20, 90), (28, 28)]])
def test_an_image_has_as_many_tokens_as_the_processor_gives_its_size(
    sizes: list[tuple[int, int]], vision_chat: Any
) -> None:
    from PIL import Image

    processor = vision_chat().processor
    processor.image_processor.do_center_crop = False  # the number of tokens now follows the image's size
    chat = ChatTokenizer(processor, [processor.tokenizer.eos_token_id])
    assert chat.sizes_matter and not vision_chat().sizes_matter
    prompt = chat.prompt(CONVERSATION, "x", sizes)
    # one by one: this processor cannot stack images of different sizes
    counts = [
        len(
            processor(text="<image>", images=Image.new("RGB", size), add_special_tokens=False)["input_ids"][0]
        )
        for size in sizes
    ]
    assert prompt.runs == tuple(counts) and (prompt.ids == chat.image_token_id).sum() == sum(counts)
    assert len(chat.completion(CONVERSATION, prompt, "a bar", "x")) == len(scored_ids(chat, "a bar"))


def scored_ids(chat: ChatTokenizer, answer: str) -> list[int]:
    prompt = chat.prompt(QUESTION, "x")
    return list(chat.completion(QUESTION, prompt, answer, "x"))


def test_a_processor_that_takes_images_in_a_way_of_its_own_is_one_line(
    vision_chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = vision_chat().processor

    def refuse(self: Any, *given: Any, **named: Any) -> Any:
        raise ValueError("Nested images are only supported\nwith `multi_page`")  # as GOT-OCR 2's

    monkeypatch.setattr(type(processor), "__call__", refuse)
    with pytest.raises(
        UserError, match=r"LlavaProcessor does not take a text .*: Nested images are only supported with"
    ):
        ChatTokenizer(processor, [processor.tokenizer.eos_token_id])
