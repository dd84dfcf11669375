"""Whether a job's data, processor and model fit each other, and all ranks hold the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from fasttrain.config import DPOConfig
from fasttrain.data.prepare import tokenize_all
from fasttrain.data.prepared import PreparedData
from fasttrain.data.sources import first_readable
from fasttrain.data.tokens import ChatTokenizer
from fasttrain.errors import UserError
from fasttrain.model.attention import why_unshared
from fasttrain.model.families import sees_prompts_whole
from fasttrain.model.load import as_stored
from fasttrain.model.positions import why_too_long
from fasttrain.model.routing import declares_routing
from fasttrain.progress import say, ticker
from fasttrain.ranks import full_shape, ranks
from fasttrain.train.engine import check_engine
from fasttrain.train.watch import split_eval
from fasttrain_data.unread import unread_image


def check_same_everywhere(config: DPOConfig, datasets: list[PreparedData]) -> None:
    """Refuse ranks that hold other pairs or another recipe than the first: every rank plans all ranks' packs from its own."""
    accounts = [data.account for data in datasets]
    found = ranks().gather(
        [[a.pairs, a.groups, a.images, [str(entry.where) for entry in a.skipped]] for a in accounts]
        + [config.to_yaml()]
    )
    other = next((rank for rank, held in enumerate(found) if held != found[0]), None)
    if other is None:
        return
    mistake = f"-c: wanted one recipe for all ranks, got another on rank {other}"
    for name, first, theirs in zip(("train", "eval"), found[0][:-1], found[other][:-1]):
        if first != theirs:
            mistake = (
                f"data.{name}: wanted the same pairs and images on all ranks, got {_told(first)} on rank 0 and "
                f"{_told(theirs)} on rank {other}: do all machines see the same files?"
            )
            break
    ranks().share_mistake(UserError(mistake))


def _told(held: list[Any]) -> str:
    pairs, groups, images, skipped = held
    return f"{pairs:,} pairs in {groups:,} groups with {images:,} images ({len(skipped):,} rows left out)"


@contextlib.contextmanager
def notes(chat: ChatTokenizer) -> Iterator[None]:
    """Say what the tokenizer had to note about answers while the block ran."""
    appended, split = chat.appended_end, chat.split_boundary
    yield
    appended, split = chat.appended_end - appended, chat.split_boundary - split
    if appended:
        say(
            f"note: the chat template ends no answer; {chat.end_tokens[0]} is added to all {appended} answers"
        )
    if split:
        say(
            f"note: {split} answers do not tokenize together with their prompt and were tokenized by themselves"
        )


def check_recipe(config: DPOConfig, model_config: Any, dtype: torch.dtype, processes: int) -> None:
    """UserError for settings that the recipe's engine, so many ranks, or a model of this configuration cannot follow."""
    check_engine(config, dtype)
    if processes > 1 and split_eval(config.data.eval)[1]:
        raise UserError(
            "data.eval: wanted pair files with several ranks, got a benchmark folder, which one process can watch; "
            "use `fasttrain eval` on the checkpoints"
        )
    check_grouping(config, model_config)
    if config.loss.router_aux_weight and not declares_routing(model_config):
        raise UserError(
            f"loss.router_aux_weight: wanted a mixture of experts that returns its router's logits, got model type "
            f"{model_config.model_type!r}"
        )
    _refuse_quantized(as_stored(config, model_config))


def check_grouping(config: DPOConfig, model_config: Any) -> None:
    """UserError where questions about one image cannot share its pass."""
    if config.data.group_by == "image" and sees_prompts_whole(model_config):
        raise UserError(
            f"data.group_by: wanted prompt for a model of type {model_config.model_type}, whose images see the question, got image"
        )


def _refuse_quantized(config: DPOConfig) -> None:
    """Refuse quantised weights under ZeRO-3."""
    if config.distributed.zero_stage == 3 and config.model.quantize is not None:
        raise UserError(
            f"distributed.zero_stage: wanted 2 with model.quantize {config.model.quantize}: quantised weights cannot be "
            "partitioned, got 3"
        )


def check_blank(model: Any, images: int) -> None:
    """Refuse a model whose images pass through layers that a sequence without images leaves out."""
    if images and not hasattr(model.base_model, "get_image_features"):
        raise UserError(
            f"distributed.zero_stage: wanted null for {type(model).__name__} with images: it runs other layers with images than "
            "without, and under ZeRO all passes must run the same"
        )


def check_image_experts(model: Any, config: DPOConfig, datasets: list[PreparedData]) -> None:
    """Refuse Ernie 4.5 VL's experts for the tokens of images under ZeRO where passes have none: a rank would wait for the others'."""
    experts = [weight for name, weight in model.named_parameters() if ".vision_moe." in name]
    stage = config.distributed.zero_stage
    if ranks().size == 1 or not experts or (stage != 3 and not any(w.requires_grad for w in experts)):
        return
    if any(d.images_in_part or (d.account.images and not config.train.share_prefix) for d in datasets):
        raise UserError(
            f"distributed.zero_stage: wanted null, or 2 with an adapter beside the experts, for {type(model).__name__}, whose experts for "
            f"images run in passes with images only, where all ranks must run the same, got {stage} and passes of both kinds; or give "
            "every prompt an image and leave train.share_prefix true"
        )


def warn_of_unread_columns(data: PreparedData, takes_images: bool) -> None:
    """Name a key that seems to hold images or a system turn and is not read: extra keys are allowed, a run without them is not meant."""
    for source in data.files.sources:
        row = first_readable(source) or {}
        if isinstance(row.get("system"), str) and row["system"]:
            say(
                f"warning: {source.where(0)}: system is not read; a system turn stands at the head of prompt's messages"
            )
        if takes_images and (key := unread_image(row)):
            say(
                f"warning: {source.where(0)}: {key} is not read; images go under images or image, and pairs without them train on "
                "text alone"
            )


def check_vocabulary(chat: ChatTokenizer, model: Any) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings."""
    rows = full_shape(model.get_input_embeddings().weight)[0]
    if len(chat.tokenizer) > rows:
        raise UserError(
            f"model.name: wanted an embedding for all {len(chat.tokenizer)} tokens, got {rows} rows"
        )


def check_image_token(chat: ChatTokenizer, model: Any) -> None:
    """The token that the processor writes must be the one that the model replaces by image features."""
    wanted = getattr(model.config, "image_token_id", None)
    if wanted is None:
        wanted = getattr(model.config, "image_token_index", None)
    if chat.pixels is not None and chat.image_token_id != wanted:
        raise UserError(
            f"model.name: wanted a processor that writes the model's image token {wanted}, "
            f"got token {chat.image_token_id}"
        )


def may_share(config: DPOConfig, model: Any, chat: ChatTokenizer, datasets: list[PreparedData]) -> bool:
    """Whether prompts can be run once for all their answers; UserError if the model cannot run the longest sequence."""
    longest = max(data.longest()[1] for data in datasets)
    if any(data.lazy for data in datasets) and _matters(model, longest):
        with notes(chat):  # only the exact length can tell
            for data in datasets:
                tokenize_all(data, chat, ticker)
        longest = max(data.longest()[1] for data in datasets)
    reason = why_separate(config, model, longest)
    if reason:
        say(
            f"warning: {type(model).__name__} cannot share prefixes: {reason}; every completion runs as its own sequence"
        )
    return config.train.share_prefix and reason is None


def why_separate(config: DPOConfig, model: Any, longest: int) -> str | None:
    """Why prompts cannot be run once although the recipe wants it; UserError if sequences of `longest` tokens cannot be run."""
    problem = why_too_long(model, longest)
    if problem:
        raise UserError(
            f"data.max_length: {type(model).__name__} cannot run the longest sequence of {longest} tokens: {problem}; "
            "lower data.max_length and set data.overflow"
        )
    return why_unshared(model, longest) if config.train.share_prefix else None


def _matters(model: Any, longest: int) -> bool:
    """Whether sequences of so many tokens are treated otherwise than short ones."""
    return bool(why_too_long(model, longest)) or why_unshared(model, longest) != why_unshared(model, 1)
