"""Everything a command needs before it trains: checked folders, data as tokens, the model, the cache."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fasttrain.config import DPOConfig
from fasttrain.data.batch import PackMaker
from fasttrain.data.images import blank_image
from fasttrain.data.prepare import Preparation, tokenize_all
from fasttrain.data.prepared import PreparedData
from fasttrain.data.tokens import ChatTokenizer
from fasttrain.errors import UserError
from fasttrain.files import HashMemo, cache_root
from fasttrain.model.attention import attention_facts, check_attention, silence_dropout, why_unshared
from fasttrain.model.compiled_layers import compile_layers
from fasttrain.model.families import FamilyInputs
from fasttrain.model.flops import ModelShape, measure_shape
from fasttrain.model.fused_layers import fuse_layers
from fasttrain.model.fused_lora import fuse_lora
from fasttrain.model.fused_rotary import fuse_rotary
from fasttrain.model.load import (
    find_folder,
    load_model,
    load_model_config,
    load_processor,
    pick_device,
    pick_dtype,
    stop_token_ids,
    takes_images,
)  # fmt: skip
from fasttrain.model.lora import attach_lora, choose_trainable, language_model
from fasttrain.model.policy import Policy
from fasttrain.model.positions import why_too_long
from fasttrain.model.routing import declares_routing
from fasttrain.plan.run_memory import RunMemory
from fasttrain.progress import say, ticker
from fasttrain.ranks import full_shape, ranks
from fasttrain.reference.cache import ReferenceCache, cache_folder
from fasttrain.reference.key import CompletionKeys, identity_hash, model_identity
from fasttrain.train.engine import check_engine, partitioned_loading
from fasttrain.train.losses import PairLoss
from fasttrain.train.objective import Objective
from fasttrain.train.watch import Watch, open_watches, split_eval


@dataclass
class Job:
    """A recipe brought to life. `adapted` is the PeftModel, None for full fine-tuning."""

    config: DPOConfig
    loss: Objective
    device: torch.device
    model_folder: Path
    processor: Any
    chat: ChatTokenizer
    train: PreparedData
    eval: PreparedData | None
    watches: list[Watch]
    policy: Policy
    family: FamilyInputs
    adapted: Any | None
    shape: ModelShape
    memory: RunMemory
    identity: dict[str, Any]
    keys: CompletionKeys
    cache_path: Path
    memo: HashMemo
    tokens_per_pack: int
    checkpointing: bool
    workers: int

    @property
    def datasets(self) -> list[PreparedData]:
        return [self.train, *([self.eval] if self.eval else [])]

    @functools.cached_property
    def cache(self) -> ReferenceCache:
        """Opened, and made if need be, when it is first asked for: not every objective has a reference."""
        return ReferenceCache(self.cache_path, self.identity)

    def close(self) -> None:
        """Close the databases; prepared data and model go with the object."""
        if "cache" in vars(self):
            self.cache.close()
        self.memo.close()

    def tokenize_all(self, data: PreparedData) -> None:
        """Give all groups of a large file their tokens now."""
        with _notes(self.chat):
            tokenize_all(data, self.chat, ticker)

    def maker(self, data: PreparedData, with_reference: bool) -> PackMaker:
        cache = self.cache if with_reference else None
        return PackMaker(data, self.chat.pixels, self.keys, cache, self.family, self.chat.image_token_id)


def build_job(config: DPOConfig, loss: Objective | None = None, today: date | None = None) -> Job:
    """Check and load everything, cheap things first; UserError at the first mistake. `loss` is the recipe's if not given.

    `today` is the day that a chat template may write.
    """
    objective: Objective = loss or PairLoss(config.loss)
    with all_or_none():
        return _build_job(config, objective, today)


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """What is a mistake for one rank stops all of them, with one message."""
    mistake: UserError | None = None
    try:
        yield
    except UserError as error:
        mistake = error
    ranks().share_mistake(mistake)


def _build_job(config: DPOConfig, objective: Objective, today: date | None) -> Job:
    torch.manual_seed(config.train.seed)
    device = pick_device()
    folder = find_folder(config.model)
    model_config = load_model_config(folder, config.model)
    check_attention(config.model.attention, model_config, device, pick_dtype(config.model.dtype, device))
    check_engine(config, pick_dtype(config.model.dtype, device))
    weight = config.loss.router_aux_weight
    if weight and not declares_routing(model_config):
        raise UserError(
            f"loss.router_aux_weight: wanted a mixture of experts that returns its router's logits, got model type "
            f"{model_config.model_type!r}"
        )
    processor = load_processor(folder, config.model, takes_images(model_config))
    chat = ChatTokenizer(processor, stop_token_ids(processor, folder), config.model.bos, today)
    memo = HashMemo(cache_root() / "hashes.sqlite")
    pair_files, folders = split_eval(config.data.eval)
    if folders and ranks().size > 1:
        raise UserError(
            "data.eval: wanted pair files with several ranks, got a benchmark folder, which one process can watch; "
            "use `fasttrain eval` on the checkpoints"
        )
    watches = open_watches(folders, config.data, memo)
    preparing = _start_preparing(config, pair_files, objective, chat, memo)
    datasets = None if preparing[0].in_background else _finish(preparing, chat)
    zero3 = config.distributed.zero_stage == 3
    if zero3:
        _refuse_quantized(config)
    partition = partitioned_loading(config, pick_dtype(config.model.dtype, device)) if zero3 else None
    model = load_model(folder, config.model, model_config, device, zero3=zero3)
    del partition
    _check_vocabulary(chat, model)
    _check_image_token(chat, model)
    silence_dropout(model)
    policy = Policy(model, config.model.attention)
    if not zero3:  # the weights are not whole here: make_engine checks
        policy.check()
    if chat.pixels is not None and ranks().size > 1 and config.distributed.zero_stage is not None:
        policy.blank = blank_image(chat.pixels)
    torch.manual_seed(config.train.seed)  # a new adapter is the same however the model was loaded
    adapted = attach_lora(model, config.lora, config.model.train_projector) if config.lora else None
    choose_trainable(model, adapted, config.model.train_projector)
    fuse_rotary(language_model(model))
    if adapted is not None and config.distributed.zero_stage != 3:
        fuse_lora(model)
        if not config.train.compile:
            fuse_layers(language_model(model))
    if config.train.compile:
        say(
            f"compiling: {compile_layers(language_model(model))} norms and activations run code made by torch.compile"
        )
    adapter = config.lora.init_from if config.lora else None
    dtype = str(pick_dtype(config.model.dtype, device)).removeprefix("torch.")
    identity = model_identity(folder, model_config, config.model, dtype, adapter, memo)
    train, evaluation = datasets or _finish(preparing, chat)
    if policy.blank is not None:
        _check_blank(model, train)
    policy.set_shared(_may_share(config, model, chat, [train, *([evaluation] if evaluation else [])]))
    shape = measure_shape(model)
    memory = RunMemory(config, model_config, model.dtype, train, device, ranks().size)
    checkpointing, tokens = memory.settings()
    if (
        dtype != "float32"
    ):  # rounding differs between ways to attend, by more than a first step's check allows for
        identity["attention"] = attention_facts(policy)["attention_backend"] if policy.shared else "unshared"
    digest = identity_hash(identity)
    return Job(
        config=config,
        loss=objective,
        device=device,
        model_folder=folder,
        processor=processor,
        chat=chat,
        train=train,
        eval=evaluation,
        watches=watches,
        policy=policy,
        family=FamilyInputs(model, processor),
        adapted=adapted,
        shape=shape,
        memory=memory,
        identity=identity,
        keys=CompletionKeys(digest, chat.fingerprint()),
        cache_path=cache_folder(config.reference.cache) / f"{digest}.sqlite",
        memo=memo,
        tokens_per_pack=tokens,
        checkpointing=checkpointing,
        workers=_workers(config, train),
    )


def _start_preparing(
    config: DPOConfig, pair_files: list[str], loss: Objective, chat: ChatTokenizer, memo: HashMemo
) -> tuple[Preparation, Preparation | None]:
    """Training and evaluation data on their way; large training files are read while the model is loaded."""
    start = functools.partial(
        Preparation,
        data=config.data,
        chat=chat,
        memo=memo,
        seed=config.train.seed,
        progress=ticker,
        read=loss.read,
    )
    # an evaluation is one step over all of its pairs
    evaluation = start(pair_files, limit_pairs=None, whole=True) if pair_files else None
    return start(config.data.train, limit_pairs=config.data.limit_pairs), evaluation


def _finish(
    preparing: tuple[Preparation, Preparation | None], chat: ChatTokenizer
) -> tuple[PreparedData, PreparedData | None]:
    train, evaluation = preparing
    if chat.pixels is not None and chat.leaves_out_bos():
        bos = chat.tokenizer.bos_token
        say(
            f"note: the chat template writes no {bos}, and prompts begin without it, as in TRL and vLLM; transformers' processors put "
            f"it in front of a chat, as model.bos: tokenizer does here"
        )
    with _notes(chat):
        return train.finish(), evaluation.finish() if evaluation else None


@contextlib.contextmanager
def _notes(chat: ChatTokenizer) -> Iterator[None]:
    """Say what the tokenizer had to note about answers while the block ran."""
    appended, split = chat.appended_end, chat.split_boundary
    yield
    appended, split = chat.appended_end - appended, chat.split_boundary - split
    if appended:
        say(
            f"note: the chat template ends no answer; {chat.end_tokens[0]} is added to all {appended} answers"
        )
    if split:
        say(f"note: {split} answers do not tokenize together with their prompt and were tokenized alone")


def _refuse_quantized(config: DPOConfig) -> None:
    if config.model.quantize is not None:
        raise UserError(
            f"distributed.zero_stage: wanted 2 with model.quantize {config.model.quantize}: quantised weights cannot be "
            "partitioned, got 3"
        )


def _check_blank(model: Any, train: PreparedData) -> None:
    """Refuse a model whose images pass through layers that a sequence without images leaves out."""
    if train.account.images and not hasattr(model.base_model, "get_image_features"):
        raise UserError(
            f"distributed.zero_stage: wanted null for {type(model).__name__} with images on several ranks: it runs other layers "
            "with images than without, and under ZeRO all ranks must run the same"
        )


def _check_vocabulary(chat: ChatTokenizer, model: Any) -> None:
    rows = full_shape(model.get_input_embeddings().weight)[0]
    if len(chat.tokenizer) > rows:
        raise UserError(
            f"model.name: wanted an embedding for all {len(chat.tokenizer)} tokens, got {rows} rows"
        )


def _check_image_token(chat: ChatTokenizer, model: Any) -> None:
    """The token that the processor writes must be the one that the model replaces by image features."""
    wanted = getattr(model.config, "image_token_id", None)
    if wanted is None:
        wanted = getattr(model.config, "image_token_index", None)
    if chat.pixels is not None and chat.image_token_id != wanted:
        raise UserError(
            f"model.name: wanted a processor that writes the model's image token {wanted}, "
            f"got token {chat.image_token_id}"
        )


def _may_share(config: DPOConfig, model: Any, chat: ChatTokenizer, datasets: list[PreparedData]) -> bool:
    longest = max(data.longest()[1] for data in datasets)
    if any(data.lazy for data in datasets) and _matters(model, longest):
        with _notes(chat):  # only the exact length can tell
            for data in datasets:
                tokenize_all(data, chat, ticker)
        longest = max(data.longest()[1] for data in datasets)
    problem = why_too_long(model, longest)
    if problem:
        raise UserError(
            f"data.max_length: {type(model).__name__} cannot run the longest sequence of {longest} tokens: {problem}; "
            "lower data.max_length and set data.overflow"
        )
    if not config.train.share_prefix:
        return False
    reason = why_unshared(model, longest)
    if reason:
        say(
            f"warning: {type(model).__name__} cannot share prefixes: {reason}; every completion runs as its own sequence"
        )
    return reason is None


def _matters(model: Any, longest: int) -> bool:
    """Whether sequences of so many tokens are treated otherwise than short ones."""
    return bool(why_too_long(model, longest)) or why_unshared(model, longest) != why_unshared(model, 1)


def _workers(config: DPOConfig, data: PreparedData) -> int:
    if config.data.workers != "auto":
        return int(config.data.workers)
    if sys.platform != "linux" or not (data.account.images or data.lazy):
        return 0
    if not data.account.images:
        return 1
    return max(1, min(4, len(os.sched_getaffinity(0)) - 1))
