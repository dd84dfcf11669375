"""Batches of questions through a model: an image goes through it once, whatever the number of questions about it.

What the prompts of a batch have in common up to their last image token is run once; its keys and values are then given to
every question about that image, and only the rest of each prompt is run per question. A second turn goes on from the same
place, so no image is encoded twice. Rows that have ended leave the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.answering.decoding import Decoding, Reply
from fasttrain.answering.kv_cache import CACHE_NAME, RoomyCache
from fasttrain.answering.picking import TokenPicker
from fasttrain.answering.questions import ImageSource, Question, next_turn
from fasttrain.answering.run import Failed
from fasttrain.data.bad_row import BadRow
from fasttrain.data.images import hash_bytes, join_inputs
from fasttrain.data.pairs import Message
from fasttrain.data.tokens import ChatTokenizer
from fasttrain.errors import UserError

_Pixels = dict[tuple[Any, ...], dict[str, Tensor]]  # by prefix


@dataclass
class _Prefix:
    """Prompts up to their last image token, run once: rows of a cache and which of its positions are padding."""

    cache: RoomyCache
    mask_PT: Tensor
    row: dict[tuple[Any, ...], int] = field(default_factory=dict)


class Generator:
    """Answers with a text-only causal language model or LLaVA whose layers attend to all that went before.

    model: the Hugging Face model, adapted in place or not, without attention of ours; it is run as it stands.
    positions: the most tokens it can run in one sequence, None for no limit.
    """

    def __init__(
        self, model: Any, chat: ChatTokenizer, stops: Sequence[int], positions: int | None = None
    ) -> None:
        self.model, self.chat, self.positions = model, chat, positions
        self.stops = torch.tensor(sorted(set(stops)), device=model.device)
        self.images_encoded = 0
        self.takes_images = chat.pixels is not None

    def prompt_ids(self, question: Question) -> np.ndarray:
        """Token ids of the first turn's prompt, image tokens included; BadRow if it cannot be rendered."""
        return self.chat.prompt(question.messages, question.where).ids

    @torch.no_grad()
    def answer(self, questions: Sequence[Question], decoding: Decoding) -> list[list[Reply] | Failed]:
        """All turns of all questions, in order, or why one got no answer. The model must be in evaluation mode."""
        replies: list[list[Reply]] = [[] for _ in questions]
        failed: dict[int, Failed] = {}
        messages = [question.messages for question in questions]
        prefix: _Prefix | None = None
        contents = [[read_image(image, q) for image in q.images] for q in questions]
        for turn in range(max(question.turns for question in questions)):
            open_rows, asks = [], []
            for row, question in enumerate(questions):
                if turn >= question.turns or row in failed:
                    continue
                if turn:
                    said, asked = replies[row][-1].text, question.later_turns[turn - 1]
                    messages[row] = next_turn(messages[row], said or " ", asked)
                try:
                    asks.append(self._ask(question, messages[row], contents[row]))
                    open_rows.append(row)
                except Failed as why:
                    failed[row] = why
            if prefix is None or any(ask.prefix and ask.prefix_key not in prefix.row for ask in asks):
                pixels, broken = self._pixels(asks)
                failed |= {r: broken[a.prefix_key] for r, a in zip(open_rows, asks) if a.prefix_key in broken}
                open_rows = [row for row in open_rows if row not in failed]
                asks = [ask for ask in asks if ask.prefix_key not in broken]
                prefix = self._run_prefixes(asks, pixels)
            if not asks:
                break
            picker = TokenPicker(
                [decoding.temperature_of(questions[row]) for row in open_rows],
                [decoding.seed_of(questions[row], turn) for row in open_rows],
                decoding.top_p,
                self.model.device,
            )
            for row, reply in zip(open_rows, self._generate(asks, prefix, picker, decoding.max_new_tokens)):
                replies[row].append(reply)
        return [failed.get(row, said) for row, said in enumerate(replies)]

    def _ask(self, question: Question, messages: tuple[Message, ...], contents: list[bytes]) -> _Ask:
        """The question's prompt; Failed if it cannot be rendered, or the model has no room for it and an answer."""
        try:
            ids = self.chat.prompt(messages, question.where).ids
        except BadRow as problem:  # an earlier answer may hold an image token
            raise Failed(f"refused_request: {problem.reason}") from None
        if self.positions is not None and len(ids) >= self.positions:
            raise Failed(
                f"too_long: wanted fewer than the model's {self.positions} positions, got {len(ids)} tokens"
            )
        last = int(np.flatnonzero(ids == self.chat.image_token_id)[-1]) if contents else -1
        return _Ask(question, ids, contents, last + 1)

    def _pixels(self, asks: list[_Ask]) -> tuple[_Pixels, dict[tuple[Any, ...], Failed]]:
        """Model inputs of every different image prompt, and those whose images cannot be decoded."""
        pixels: _Pixels = {}
        broken = {}
        for key, ask in {ask.prefix_key: ask for ask in asks if ask.prefix}.items():
            assert self.chat.pixels is not None
            try:
                pixels[key] = self.chat.pixels(ask.contents)
            except ValueError as error:
                names = ", ".join(image.name() for image in ask.question.images)
                broken[key] = Failed(f"bad_image: {names} ({error})")
        return pixels, broken

    def _run_prefixes(self, asks: list[_Ask], pixels: _Pixels) -> _Prefix | None:
        """Run every different image prompt of the batch once; None if there is none."""
        different = {ask.prefix_key: ask for ask in asks if ask.prefix}
        if not different:
            return None
        ids_PT, mask_PT = self._padded([ask.ids[: ask.prefix] for ask in different.values()])
        inputs = join_inputs([pixels[key] for key in different])
        self.images_encoded += sum(len(ask.contents) for ask in different.values())
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        cache = RoomyCache()
        try:
            self.model.base_model(
                input_ids=ids_PT,
                attention_mask=mask_PT,
                position_ids=_positions(mask_PT),
                use_cache=True,
                **{CACHE_NAME: cache},
                **{name: value.to(self.model.device) for name, value in inputs.items()},
            )
        except ValueError as error:
            refuse_misfit(error)
            raise
        return _Prefix(cache, mask_PT, {key: row for row, key in enumerate(different)})

    def _generate(
        self, asks: list[_Ask], prefix: _Prefix | None, picker: TokenPicker, max_new_tokens: int
    ) -> list[Reply]:
        """One reply per ask. Asks with images and asks without may stand side by side: the latter see no prefix."""
        ids_ST, mask_ST = self._padded([ask.ids[ask.prefix :] for ask in asks])
        cache, position_ST = RoomyCache(), _positions(mask_ST)
        if prefix is not None:
            rows = [prefix.row[ask.prefix_key] if ask.prefix else 0 for ask in asks]
            rows_S = torch.tensor(rows, device=ids_ST.device)
            cache = prefix.cache.selected(rows_S)
            seen_ST = prefix.mask_PT[rows_S]
            seen_ST = seen_ST * torch.tensor([[bool(ask.prefix)] for ask in asks], device=ids_ST.device)
            position_ST = _positions(mask_ST) + seen_ST.sum(-1, keepdim=True)
            mask_ST = torch.cat([seen_ST, mask_ST], dim=-1)
        room_S = torch.tensor([self._room(ask, max_new_tokens) for ask in asks], device=ids_ST.device)
        tokens = self._decode(ids_ST, mask_ST, position_ST, cache, picker, room_S)
        return [reply_of(row, set(self.stops.tolist()), self.chat.tokenizer) for row in tokens]

    def _room(self, ask: _Ask, max_new_tokens: int) -> int:
        return (
            max_new_tokens if self.positions is None else min(max_new_tokens, self.positions - len(ask.ids))
        )

    def _decode(
        self,
        ids_ST: Tensor,
        mask_ST: Tensor,
        position_ST: Tensor,
        cache: RoomyCache,
        picker: TokenPicker,
        room_S: Tensor,
    ) -> list[list[int]]:
        """At most room_S new tokens of each row, its stop token included; rows that ended leave when they are half."""
        taken: list[list[int]] = [[] for _ in ids_ST]
        running = list(range(len(ids_ST)))
        done_S = torch.zeros(len(running), dtype=torch.bool, device=ids_ST.device)
        for step in itertools.count(1):
            out = self.model(
                input_ids=ids_ST, attention_mask=mask_ST, position_ids=position_ST, use_cache=True,
                logits_to_keep=1, **{CACHE_NAME: cache},
            )  # fmt: skip
            if step == 1 and bool(out.logits.isnan().any()):
                raise UserError(
                    "--model: its logits are not numbers: the weights hold nan, or overflow in this dtype"
                )
            token_S = picker.pick(out.logits[:, -1])
            for row, token, done in zip(running, token_S.tolist(), done_S.tolist()):
                if not done:
                    taken[row].append(token)
            done_S |= torch.isin(token_S, self.stops) | (room_S <= step)
            left = int((~done_S).sum())
            if not left:
                return taken
            position_ST = position_ST[:, -1:] + 1
            mask_ST = torch.cat([mask_ST, mask_ST.new_ones(len(mask_ST), 1)], dim=-1)
            ids_ST = token_S[:, None]
            if 2 * left <= len(running):
                kept_S = (~done_S).nonzero()[:, 0]
                kept = kept_S.tolist()
                running = [running[row] for row in kept]
                picker.select(kept)
                cache.batch_select_indices(kept_S)
                ids_ST, mask_ST, position_ST = ids_ST[kept_S], mask_ST[kept_S], position_ST[kept_S]
                done_S, room_S = done_S[kept_S], room_S[kept_S]
        raise AssertionError("every row ends")

    def _padded(self, rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask (S, T), padded on the left. The id of padding is never seen by a real token."""
        longest = max(map(len, rows))
        ids, mask = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), longest), np.int64)
        for number, row in enumerate(rows):
            ids[number, longest - len(row) :] = row
            mask[number, longest - len(row) :] = 1
        device = self.model.device
        return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def reply_of(tokens: list[int], stops: set[int], tokenizer: Any) -> Reply:
    """The turn that these tokens are: what stands before the first stop token."""
    length = next((at for at, token in enumerate(tokens) if token in stops), None)
    kept = tokens if length is None else tokens[:length]
    text = tokenizer.decode(kept, skip_special_tokens=True).strip()
    return Reply(text, "length" if length is None else "stop", len(kept) + (length is not None))


@dataclass(frozen=True)
class _Ask:
    """A prompt to be gone on from. prefix: tokens up to the last image token, 0 without images."""

    question: Question
    ids: np.ndarray
    contents: list[bytes]
    prefix: int

    @property
    def prefix_key(self) -> tuple[Any, ...]:
        return (*map(hash_bytes, self.contents), self.ids[: self.prefix].tobytes())


def _positions(mask_ST: Tensor) -> Tensor:
    return (mask_ST.cumsum(-1) - 1).clamp(min=0)


def refuse_misfit(error: Exception) -> None:
    """UserError where a model says that a prompt has more or fewer image tokens than its images have features."""
    if "image tokens" in str(error).lower():
        raise UserError(
            f"--model: the processor writes another number of image tokens than the model makes features: {error}"
        ) from None


def read_image(image: ImageSource, question: Question) -> bytes:
    """The image's encoded bytes; BadRow names the question if they cannot be read."""
    try:
        return image.read()
    except OSError as error:
        raise BadRow(
            question.where, "images", "a readable image", f"{image.name()} ({error.strerror})"
        ) from None
