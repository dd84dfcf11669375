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
from typing import Any, NamedTuple

import torch

from fasttrain.config import DPOConfig
from fasttrain.data.batch import PackMaker
from fasttrain.data.images import blank_images
from fasttrain.data.packs import Order
from fasttrain.data.prepare import Preparation, tokenize_all
from fasttrain.data.prepared import PreparedData
from fasttrain.data.tokens import ChatTokenizer
from fasttrain.devices import pick_device, pick_dtype
from fasttrain.errors import UserError
from fasttrain.files import HashMemo, cache_root, user_path
from fasttrain.model.attention import attention_facts, check_attention
from fasttrain.model.compiled_layers import compile_layers
from fasttrain.model.families import FamilyInputs, sees_prompts_whole
from fasttrain.model.flops import ModelShape, measure_shape
from fasttrain.model.folder import find_folder
from fasttrain.model.fused_layers import fuse_layers
from fasttrain.model.fused_lora import fuse_lora
from fasttrain.model.fused_rotary import fuse_rotary
from fasttrain.model.load import (
    load_model,
    load_model_config,
    load_processor,
    stop_token_ids,
    takes_images,
)  # fmt: skip
from fasttrain.model.lora import (
    attach_lora,
    choose_trainable,
    images_train_alone,
    language_model,
    modules_replaced,
    note_experts,
)  # fmt: skip
from fasttrain.model.policy import Policy
from fasttrain.model.silence import silence_dropout
from fasttrain.plan.choose import choose_filling
from fasttrain.plan.device_memory import free_memory
from fasttrain.plan.run_memory import RunMemory
from fasttrain.progress import say, ticker
from fasttrain.ranks import ranks
from fasttrain.reference.cache import ReferenceCache, cache_folder
from fasttrain.reference.key import CompletionKeys, identity_hash, model_identity
from fasttrain.threads import one_thread
from fasttrain.train.engine import partitioned_loading
from fasttrain.train.job_checks import (
    check_blank,
    check_image_experts,
    check_image_token,
    check_recipe,
    check_same_everywhere,
    check_vocabulary,
    may_share,
    notes,
    warn_of_unread_columns,
)  # fmt: skip
from fasttrain.train.losses import PairLoss
from fasttrain.train.objective import Objective
from fasttrain.train.run_folder import Began
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
    packs_filled_to: int
    checkpointing: bool
    workers: int

    @property
    def datasets(self) -> list[PreparedData]:
        return [self.train, *([self.eval] if self.eval else [])]

    @property
    def order(self) -> Order:
        """The training groups in the order of the steps."""
        config = self.config.train
        return Order(self.train, config.pairs_per_step, config.shuffle, config.seed)

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
        with notes(self.chat):
            tokenize_all(data, self.chat, ticker)

    def maker(self, data: PreparedData, with_reference: bool) -> PackMaker:
        cache = self.cache if with_reference else None
        return PackMaker(data, self.chat.pixels, self.keys, cache, self.family, self.chat.image_token_id)


def build_job(config: DPOConfig, loss: Objective | None = None, began: Began | None = None) -> Job:
    """Check and load everything, cheap things first; UserError at the first mistake. `loss` is the recipe's if not given.

    `began` is what a run keeps from its first start; as if it were made now if not given.
    """
    objective: Objective = loss or PairLoss(config.loss)
    began = began or Began(date.today())
    with all_or_none():
        read = _read(config, objective, began.day)
    # under ZeRO-3 the ranks load together, and one that fails must not wait for the others: they hear of it by the watch
    with contextlib.nullcontext() if config.distributed.zero_stage == 3 else all_or_none():
        loaded = _load(config, read)
    check_same_everywhere(config, loaded.datasets)
    train = loaded.datasets[0]
    policy, dtype = loaded.policy, loaded.policy.model.dtype
    memory = RunMemory(
        config, read.model_config, dtype, train, read.device,
        free=min(ranks().gather(free_memory(read.device))), ranks=ranks().size, shared=policy.shared,
    )  # fmt: skip
    checkpointing, tokens = memory.settings(began.settings)
    tokens = memory.most_without_gradients(tokens)  # training has no larger packs
    identity = loaded.identity
    # rounding differs between ways to attend, by more than a first step's check allows for
    if pick_dtype(config.model.dtype, read.device) != torch.float32:
        identity["attention"] = attention_facts(policy)["attention_backend"] if policy.shared else "unshared"
    backend = torch.backends.cuda if read.device.type == "cuda" else torch.backends.mkldnn
    if (precision := backend.matmul.fp32_precision) not in (
        "none",
        "ieee",
    ):  # the caller's: TF32 or bf16 inside
        identity["fp32_products"] = precision
    digest = identity_hash(identity)
    return Job(
        config=config,
        loss=objective,
        device=read.device,
        model_folder=read.folder,
        processor=read.processor,
        chat=read.chat,
        train=train,
        eval=loaded.datasets[1] if len(loaded.datasets) > 1 else None,
        watches=read.watches,
        policy=policy,
        family=FamilyInputs(policy.model, read.processor),
        adapted=loaded.adapted,
        shape=measure_shape(policy.model),
        memory=memory,
        identity=identity,
        keys=CompletionKeys(digest, read.chat.fingerprint()),
        cache_path=cache_folder(config.reference.cache) / f"{digest}.sqlite",
        memo=read.memo,
        tokens_per_pack=tokens,
        packs_filled_to=choose_filling(config, tokens, read.device),
        checkpointing=checkpointing,
        workers=_workers(config, train),
    )


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """What is a mistake for one rank stops all of them, with one message. Inside it no rank may wait for another."""
    mistake: UserError | None = None
    try:
        yield
    except UserError as error:
        mistake = error
    ranks().share_mistake(mistake)


class _Read(NamedTuple):
    """What is known before the model's weights are read."""

    device: torch.device
    folder: Path
    model_config: Any
    processor: Any
    chat: ChatTokenizer
    memo: HashMemo
    watches: list[Watch]
    preparing: tuple[Preparation, Preparation | None]
    datasets: list[PreparedData] | None  # None while they are read in the background


class _Loaded(NamedTuple):
    """The model, ready to train, and all of the data: training pairs, then those of evaluation if there are any."""

    policy: Policy
    adapted: Any | None
    identity: dict[str, Any]
    datasets: list[PreparedData]


def _read(config: DPOConfig, objective: Objective, today: date) -> _Read:
    torch.manual_seed(config.train.seed)
    device = pick_device()
    if device.type == "cpu" and torch.backends.mps.is_available():
        say("note: Apple's GPU is not used: fasttrain trains on CUDA devices and CPUs")
    folder = find_folder(config.model)
    model_config = load_model_config(folder, config.model)
    check_attention(config.model.attention, model_config, device, pick_dtype(config.model.dtype, device))
    check_recipe(config, model_config, pick_dtype(config.model.dtype, device), ranks().size)
    processor = load_processor(folder, config.model, takes_images(model_config))
    chat = ChatTokenizer(processor, stop_token_ids(processor, folder), config.model.bos, today)
    chat.sees_prompts_whole = sees_prompts_whole(model_config)
    memo = HashMemo(cache_root() / "hashes.sqlite")
    pair_files, folders = split_eval(config.data.eval)
    watches = open_watches(folders, config.data, memo)
    preparing = _start_preparing(config, pair_files, objective, chat, memo)
    datasets = None if preparing[0].in_background else _finish(preparing, chat)
    return _Read(device, folder, model_config, processor, chat, memo, watches, preparing, datasets)


def _load(config: DPOConfig, read: _Read) -> _Loaded:
    chat, zero_stage, dtype = (
        read.chat,
        config.distributed.zero_stage,
        pick_dtype(config.model.dtype, read.device),
    )
    zero3 = zero_stage == 3
    partition = partitioned_loading(config, dtype) if zero3 else None
    start = config.lora.init_from if config.lora else None
    adapter = None if start is None else user_path(start)
    replaced = modules_replaced(adapter)
    model = load_model(
        read.folder, config.model, read.model_config, read.device, zero3=zero3, replaced=replaced
    )
    del partition
    check_vocabulary(chat, model)
    check_image_token(chat, model)
    silence_dropout(model)
    policy = Policy(model, config.model.attention)
    if not zero3:  # the weights are not whole here: make_engine checks
        # a product that shares its cores with readers of pairs is slower with every thread: each waits for the slowest
        with one_thread() if read.preparing[0].in_background else contextlib.nullcontext():
            policy.check()
    torch.manual_seed(config.train.seed)  # a new adapter is the same however the model was loaded
    adapted = attach_lora(model, config.lora, config.model.train_projector) if config.lora else None
    note_experts(model, config.lora)
    choose_trainable(model, adapted, config.model.train_projector)
    if chat.pixels is not None and zero_stage is not None:
        policy.images_train_alone = images_train_alone(model)
        if ranks().size > 1 or policy.images_train_alone:
            policy.blank = blank_images(chat.pixels)
        if zero3 and ranks().size > 1:
            policy.two_blanks = blank_images(chat.pixels, 2)
    fuse_rotary(language_model(model))
    if adapted is not None and not zero3:
        fuse_lora(model)
    if config.train.compile:
        say(
            f"compiling: {compile_layers(language_model(model))} norms and activations run code made by torch.compile"
        )
    else:
        fuse_layers(language_model(model))
    name = str(dtype).removeprefix("torch.")
    identity = model_identity(read.folder, read.model_config, config.model, name, adapter, read.memo)
    datasets = read.datasets or _finish(read.preparing, chat)
    if policy.blank is not None:
        check_blank(model, datasets[0].account.images)
        check_image_experts(model, config, datasets)
    policy.set_shared(may_share(config, model, chat, datasets))
    return _Loaded(policy, adapted, identity, datasets)


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


def _finish(preparing: tuple[Preparation, Preparation | None], chat: ChatTokenizer) -> list[PreparedData]:
    train, evaluation = preparing
    if chat.pixels is not None and chat.leaves_out_bos():
        bos = chat.tokenizer.bos_token
        say(
            f"note: the chat template writes no {bos}, and prompts begin without it, as in TRL and vLLM; transformers' processors put "
            f"it in front of a chat, as model.bos: tokenizer does here"
        )
    if chat.own_end:
        stops = ", ".join(token for token in chat.end_tokens if token not in chat.own_end)
        say(
            f"note: the chat template ends answers with {chat.own_end[0]}, which generation does not stop at (it stops at {stops})"
        )
    if chat.left_out:
        say(
            f"note: the chat template ends its generation prompt with {chat.left_out!r}, which it does not write before every answer: "
            f"a prompt is trained up to where its answers leave it"
        )
    if chat.loses_thoughts:
        say("note: the chat template leaves out what an answer says before </think>")
    with notes(chat):
        datasets = [train.finish(), *([evaluation.finish()] if evaluation else [])]
    for data in datasets:
        warn_of_unread_columns(data, takes_images=chat.pixels is not None)
    return datasets


def _workers(config: DPOConfig, data: PreparedData) -> int:
    if config.data.workers != "auto":
        return int(config.data.workers)
    if sys.platform != "linux" or not (data.account.images or data.lazy):
        return 0
    if not data.account.images:
        return 1
    return max(1, min(4, len(os.sched_getaffinity(0)) - 1))
