"""A model in this process as something that answers: loaded when the first question needs it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from fasttrain.answering.batches import Budget, halving, plan_order, take_batches
from fasttrain.answering.decoding import Decoding
from fasttrain.answering.generator import Generator
from fasttrain.answering.generic import GenericGenerator
from fasttrain.answering.kv_cache import cache_bytes_per_token
from fasttrain.answering.options import by_options
from fasttrain.answering.questions import Question, image_hashes
from fasttrain.answering.run import Done, Failed
from fasttrain.config import ModelConfig
from fasttrain.data.bad_row import BadRow
from fasttrain.data.tokens import ChatTokenizer
from fasttrain.devices import pick_device, pick_dtype
from fasttrain.errors import UserError, is_out_of_memory
from fasttrain.files import HashMemo, cache_root
from fasttrain.model import load as loading
from fasttrain.model.folder import find_folder
from fasttrain.model.lora import modules_replaced, read_adapter, read_adapter_config
from fasttrain.model.positions import rope_types, trained_positions, why_too_long
from fasttrain.plan.device_memory import device_memory, free_memory
from fasttrain.progress import say
from fasttrain.reference.key import identity_hash, model_identity

_MOST_ROWS = 64
_ANY_LENGTH = 1 << 30


class LocalModel:
    """Answers with a hub id's or folder's model, and a PEFT adapter on it.

    rows, tokens: bounds of a batch; None for what the device's memory allows. UserError at once if model, tokenizer or
    adapter cannot be used; the weights are read when the first question is asked.
    """

    def __init__(
        self,
        config: ModelConfig,
        adapter: Path | None = None,
        *,
        rows: int | None = None,
        tokens: int | None = None,
    ) -> None:
        self.config, self.adapter = config, find_adapter(adapter) if adapter is not None else None
        self.rows, self.tokens = rows, tokens
        self.device = pick_device()
        self.folder = find_folder(config)
        self.model_config = loading.load_model_config(self.folder, config, trains=False)
        self.takes_images = loading.takes_images(self.model_config)
        self.processor = loading.load_processor(self.folder, config, self.takes_images)
        self.stops = loading.stop_token_ids(self.processor, self.folder)
        self.memo = HashMemo(cache_root() / "hashes.sqlite")

    @cached_property
    def version(self) -> str:
        """A hash of everything that decides an answer besides the question: weights, adapter, template, image settings."""
        dtype = str(pick_dtype(self.config.dtype, self.device)).removeprefix("torch.")
        identity = model_identity(self.folder, self.model_config, self.config, dtype, self.adapter, self.memo)
        images = getattr(self.processor, "image_processor", None)
        settings = images.to_dict() if images is not None else None
        template = getattr(self.processor, "chat_template", None)
        asked = {"template": template, "images": str(settings), "stops": self.stops}
        if self.config.bos != "template":
            asked["bos"] = self.config.bos
        return identity_hash({**identity, **asked})

    @cached_property
    def generator(self) -> Generator | GenericGenerator:
        with by_options():
            replaced = modules_replaced(self.adapter)
            model = loading.load_model(
                self.folder, self.config, self.model_config, self.device, replaced=replaced
            )
        tokens, rows = (
            len(getattr(self.processor, "tokenizer", self.processor)),
            len(model.get_input_embeddings().weight),
        )
        if tokens > rows:
            raise UserError(f"--model: wanted an embedding for all {tokens} tokens, got {rows} rows")
        if self.adapter is not None:
            model = load_adapter(model, self.adapter)
        return make_generator(model, self.processor, self.stops, self.config.bos)

    def images_of(self, questions: Sequence[Question]) -> list[tuple[str, ...]]:
        """Content hashes of each question's images."""
        hashes = list(image_hashes(questions, self.memo))
        self.memo.save()
        return hashes

    def answer(self, questions: Sequence[Question], decoding: Decoding, done: Done) -> None:
        """Answer all questions, telling `done` of each as its batch ends."""
        budget = batch_budget(self.generator.model, self.rows, self.tokens)
        answer_in_batches(self.generator, questions, self.images_of(questions), decoding, budget, done)

    def close(self) -> None:
        self.memo.close()


def answer_in_batches(
    generator: Generator | GenericGenerator, questions: Sequence[Question], images: Sequence[tuple[str, ...]],
    decoding: Decoding, budget: Budget, done: Done,
) -> None:  # fmt: skip
    """Batches of similar length, questions about one image together; halved, for good, when memory runs out."""
    lengths, askable = [], []
    for number, question in enumerate(questions):
        try:
            lengths.append(len(generator.prompt_ids(question)))
            askable.append(number)
        except BadRow as problem:
            if images[number] and not generator.takes_images:
                raise  # no question about an image can be asked
            done(question, Failed(f"refused_request: {problem.reason}"))
    questions, images = [questions[number] for number in askable], [images[number] for number in askable]
    costs = [
        length + question.turns * decoding.max_new_tokens
        for length, question in zip(lengths, questions, strict=True)
    ]
    # questions without images share nothing, so nothing keeps them together
    groups = [hashes or number for number, hashes in enumerate(images)]
    trained = trained_positions(generator.model.config.get_text_config())
    beyond: list[int] = []

    def run(batch: list[int]) -> None:
        asked = [questions[number] for number in batch]
        for number, question, replies in zip(batch, asked, generator.answer(asked, decoding), strict=True):
            done(question, replies)
            if isinstance(replies, Failed):
                continue
            if trained and lengths[number] + sum(reply.tokens for reply in replies) > trained:
                beyond.append(number)

    def smaller(batch: list[int]) -> None:
        budget.halve(len(batch), len(batch) * max(costs[number] for number in batch))
        torch.cuda.empty_cache()
        say(f"out of memory with {len(batch)} questions at once: from now on at most {budget.rows}")

    for batch in take_batches(plan_order(lengths, groups), costs, budget):
        try:
            halving(batch, run, is_out_of_memory, smaller)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            question = questions[batch[0]]
            raise UserError(
                f"{question.where}: one question of {lengths[batch[0]]} tokens with {decoding.max_new_tokens} new ones does "
                "not fit into memory; lower --max-new-tokens, or quantize the model"
            ) from None
    if beyond:
        say(
            f"note: {len(beyond):,} of {len(questions):,} questions with their answers are longer than the {trained:,} tokens "
            f"the model was trained on, first {questions[min(beyond)].where}"
        )


def batch_budget(model: Any, rows: int | None = None, tokens: int | None = None) -> Budget:
    """The bounds of a batch as given, or what the keys and values of its tokens may take of the free memory."""
    if tokens is None:
        # of a CPU's memory a quarter, whatever others use of it now
        on_gpu = model.device.type == "cuda"
        free = (free_memory(model.device) if on_gpu else device_memory(model.device) / 4) * 0.7
        tokens = max(1, int(free // cache_bytes_per_token(model.config.get_text_config(), model.dtype)))
    return Budget(rows or _MOST_ROWS, tokens)


def make_generator(
    model: Any, processor: Any, stops: Sequence[int], bos: str = "template", today: date | None = None
) -> Generator | GenericGenerator:
    """The generator that shares image prompts where the model's layers and inputs allow it, else `generate`'s."""
    chat = ChatTokenizer(processor, list(stops), bos, today) if shares_prompts(model) else None
    if chat is None or chat.sizes_matter:
        return GenericGenerator(model, processor, stops, bos, today)
    positions = (
        model.config.get_text_config().max_position_embeddings if why_too_long(model, _ANY_LENGTH) else None
    )
    return Generator(model, chat, stops, positions)


def shares_prompts(model: Any) -> bool:
    """Whether every layer looks at all tokens before its own, whatever their number, and images are LLaVA-1.5's."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return (
        getattr(model, "_supports_attention_backend", False)
        and (model.config.model_type == "llava" or model.config is config)
        and kinds <= {"full_attention", "attention"}
        and not window
        and not getattr(config, "alibi", False)
        and not rope_types(config) & {"dynamic", "longrope"}
    )


def find_adapter(folder: Path) -> Path:
    """The adapter's folder: as given, or `final/` of a run folder."""
    for place in (folder, folder / "final"):
        if (place / "adapter_config.json").is_file() and (place / "adapter_model.safetensors").is_file():
            return place
    raise UserError(
        f"--adapter: wanted a folder with adapter_config.json and adapter_model.safetensors, or a run's folder, got {folder}"
    )


def bos_of_run(adapter: Path) -> str:
    """How the run that made an adapter began its prompts; as its template says if the recipe is not beside it."""
    recipe = find_adapter(adapter).resolve().parent / "config.yaml"
    try:
        found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        return "tokenizer" if found["model"]["bos"] == "tokenizer" else "template"
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return "template"


def load_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter's layers in place; UserError unless it has every weight, in the model's shapes."""
    with by_options():
        adapted = read_adapter(model, folder, read_adapter_config(folder), trainable=False)
        return adapted.get_base_model().eval()
