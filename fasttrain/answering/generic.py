"""Models of other shapes, through their own processor and `generate`: other vision families, sliding windows, recurrences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

import numpy as np
import torch
import transformers

from fasttrain.answering.decoding import Decoding, Reply
from fasttrain.answering.generator import read_image, refuse_misfit, reply_of
from fasttrain.answering.picking import TokenPicker
from fasttrain.answering.questions import Question, next_turn
from fasttrain.answering.run import Failed
from fasttrain.data.bad_row import BadRow
from fasttrain.data.images import open_image
from fasttrain.data.pairs import IMAGE, Message
from fasttrain.data.template_date import dated
from fasttrain.data.tokens import beginning
from fasttrain.errors import UserError, is_out_of_memory


class GenericGenerator:
    """Answers with whatever `generate` runs, one pass for prompt and images of every turn."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        stops: Sequence[int],
        bos: str = "template",
        today: date | None = None,
    ) -> None:
        self.model, self.processor, self.stops = model, processor, list(dict.fromkeys(stops))
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.takes_images = hasattr(processor, "image_processor")
        self.bos = bos
        self._today = today or date.today()
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def prompt_ids(self, question: Question) -> np.ndarray:
        """The prompt's text as token ids, an image as one: near enough to sort questions by length."""
        text = self._render([_plain(message) for message in question.messages], question, tokenize=False)
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)

    @torch.no_grad()
    def answer(self, questions: Sequence[Question], decoding: Decoding) -> list[list[Reply] | Failed]:
        """All turns of all questions, in order, or why one got no answer. The model must be in evaluation mode."""
        replies: list[list[Reply]] = [[] for _ in questions]
        failed: dict[int, Failed] = {}
        messages = [question.messages for question in questions]
        for turn in range(max(question.turns for question in questions)):
            chats: dict[int, list[dict[str, Any]]] = {}
            for row, question in enumerate(questions):
                if turn >= question.turns or row in failed:
                    continue
                if turn:
                    said, asked = replies[row][-1].text, question.later_turns[turn - 1]
                    messages[row] = next_turn(messages[row], said or " ", asked)
                try:
                    chats[row] = self._with_images(question, messages[row])
                except Failed as why:
                    failed[row] = why
            inputs, refused = self._inputs(questions, chats)
            failed |= refused
            if inputs is None:
                break
            rows = [row for row in chats if row not in refused]
            asked_now = [questions[row] for row in rows]
            for row, reply in zip(rows, self._turn(asked_now, inputs, turn, decoding)):
                replies[row].append(reply)
        return [failed.get(row, said) for row, said in enumerate(replies)]

    def _inputs(
        self, questions: Sequence[Question], chats: dict[int, list[dict[str, Any]]]
    ) -> tuple[Any, dict[int, Failed]]:
        """The model's inputs, None where nothing is left to ask, and whom template or processor refuses by itself."""
        if not chats:
            return None, {}
        first = next(iter(chats))
        try:
            return self._tokens(list(chats.values()), questions[first]), {}
        except BadRow as problem:
            if len(chats) == 1:
                return None, {first: Failed(f"refused_request: {problem.reason}")}
            refused: dict[int, Failed] = {}
            for row, chat in chats.items():
                refused |= self._inputs(questions, {row: chat})[1]
            if not refused:
                raise
        return self._inputs(questions, {row: chats[row] for row in chats if row not in refused})[0], refused

    def _turn(self, questions: list[Question], inputs: Any, turn: int, decoding: Decoding) -> list[Reply]:
        moved = {
            key: value.to(self.model.device, self.model.dtype)
            if value.is_floating_point()
            else value.to(self.model.device)
            for key, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }
        picker = TokenPicker(
            [decoding.temperature_of(question) for question in questions],
            [decoding.seed_of(question, turn) for question in questions],
            decoding.top_p,
            self.model.device,
        )
        with neutral(self.model), own_failures(self.model):
            output_ST = self.model.generate(
                **moved, max_new_tokens=decoding.max_new_tokens, do_sample=False, logits_processor=[picker],
                eos_token_id=self.stops, pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
        new_ST = output_ST[:, moved["input_ids"].shape[1] :].tolist()
        return [reply_of(tokens, set(self.stops), self.tokenizer) for tokens in new_ST]

    def _tokens(self, chats: list[list[dict[str, Any]]], question: Question) -> Any:
        """The chats' padded tokens and images, with the beginning-of-sequence token that training gave them."""
        padded: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        if self.takes_images:
            # of itself a processor adds the token unless the template wrote it
            added = {} if self.bos == "tokenizer" else {"add_special_tokens": False}
            options = {"processor_kwargs": padded | added}
            return self._render(chats, question, tokenize=True, return_dict=True, **options)
        texts = self._render(chats, question, tokenize=False)
        bos = self.tokenizer.bos_token
        adds = self.bos == "tokenizer" and bool(beginning(self.tokenizer)) and not texts[0].startswith(bos)
        return self.tokenizer(texts, add_special_tokens=adds, **padded)

    def _with_images(self, question: Question, messages: tuple[Message, ...]) -> list[dict[str, Any]]:
        """Messages as the processor's chat template takes them, pictures in their places."""
        if not self.takes_images:
            if question.images:
                raise BadRow(
                    question.where,
                    "images",
                    "a text-only row for a model that is run on text only (docs/models.md)",
                    "an image",
                )
            return [_plain(message) for message in messages]
        pictures = iter([self._picture(question, number) for number in range(len(question.images))])
        chat = []
        for role, parts in messages:
            content = [
                {"type": "image", "image": next(pictures)}
                if part == IMAGE
                else {"type": "text", "text": part[1]}
                for part in parts
            ]
            chat.append({"role": role, "content": content})
        return chat

    def _picture(self, question: Question, number: int) -> Any:
        image = question.images[number]
        try:
            return open_image(read_image(image, question))
        except ValueError as error:
            raise Failed(f"bad_image: {image.name()} ({error})") from None

    def _render(self, chat: Any, question: Question, **options: Any) -> Any:
        import jinja2

        try:
            with dated(self.processor, self._today):
                return self.processor.apply_chat_template(chat, add_generation_prompt=True, **options)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            raise BadRow(
                question.where, "question", "a conversation that the chat template renders", problem
            ) from None


@contextlib.contextmanager
def neutral(model: Any) -> Iterator[None]:
    """The model without generation settings of its own (penalties, suppressed tokens, beams), as the shared way answers."""
    from transformers import GenerationConfig

    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, owner.generation_config = owner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = own


@contextlib.contextmanager
def own_failures(model: Any) -> Iterator[None]:
    """UserError, in one line, for what the model's own code raises in the block, but memory that runs out."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        refuse_misfit(error)
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"--model: {type(model).__name__}, as transformers {transformers.__version__} has it, fails on a question: {problem}"
        ) from error


def _plain(message: Message) -> dict[str, str]:
    role, parts = message
    return {"role": role, "content": "".join(text for _, text in parts)}
