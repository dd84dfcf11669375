"""The settings of a recipe: frozen dataclasses with types, defaults, one-line descriptions and checks of values.

No torch here: `fasttrain --help` and recipe errors must answer at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from fasttrain.errors import UserError, did_you_mean
from fasttrain.setting_types import fitted

LOSS_KINDS = (
    "sigmoid", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "simpo", "orpo", "cpo", "sft",
)  # fmt: skip
_NO_KTO = "; there is no KTO here: it learns from answers that are rated one by one"
_NO_KINDS = {"dpo": "; DPO's own is sigmoid", "kto": _NO_KTO, "kto_pair": _NO_KTO}
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
TRACKERS = ("tensorboard", "wandb", "trackio")
_MOST_EPOCHS = 100_000


def setting(default: Any, doc: str) -> Any:
    """A dataclass field that carries its one-line description."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


def require(good: bool, key: str, wanted: str, got: Any) -> None:
    if not good:
        raise UserError(f"{key}: wanted {wanted}, got {got!r}")


def refuse(present: bool, key: str, what: str) -> None:
    """Name a setting whose capability this version does not have, instead of ignoring it."""
    if present:
        raise UserError(f"{key}: {what} is not available in this version of fasttrain")


def put_in_types(section: Any, prefix: str) -> None:
    """Put the values that a section was given, in Python or by a recipe, in the types of its fields; UserError names a misfit."""
    for name, hint in typing.get_type_hints(type(section)).items():
        object.__setattr__(section, name, fitted(getattr(section, name), hint, f"{prefix}{name}"))


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str = setting("", "Hub id or folder of a language or vision-language model (docs/models.md).")
    revision: str | None = setting(None, "Hub revision: branch, tag or commit.")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "Weight type; auto is bfloat16 on GPUs that compute in it (compute capability 8.0 on), else float32.",
    )
    attention: Literal["auto", "flash", "flex", "sdpa"] = setting(
        "auto",
        "Backend of attention over shared prompts; auto is flash (flash-attn), else flex (FlexAttention), on CUDA, and "
        "sdpa (torch's own kernels) on CPU. Completions that run unshared use torch's own kernels.",
    )
    quantize: Literal["nf4", "int8"] | None = setting(
        None, "Quantise the frozen base model with bitsandbytes; int8 is not available yet."
    )
    bos: Literal["template", "tokenizer"] = setting(
        "template",
        "Whether a prompt begins with the beginning-of-sequence token where only the tokenizer would write it: template is no.",
    )
    train_projector: bool = setting(
        False, "Also train the vision-to-language projector, whole; quantize leaves it as it is then."
    )
    trust_remote_code: bool = setting(False, "Run Python code that comes with the model repository.")

    def __post_init__(self) -> None:
        put_in_types(self, "model.")
        # bitsandbytes picks outlier columns from all rows of a pass, so a log-prob would depend on what is packed with it
        refuse(self.quantize == "int8", "model.quantize", "int8")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int | None = setting(None, "Rank of the update; 128, or that of init_from.")
    alpha: float | None = setting(
        None, "Scale: the update is multiplied by alpha / rank; 256, or that of init_from."
    )
    dropout: float = setting(0.0, "Dropout on the adapter's input while training.")
    targets: str | list[str] | None = setting(
        None,
        "auto: every linear of the language model except the head; all-linear: those of tower and projector too; or names, "
        "or one regular expression.",
    )
    init_from: str | None = setting(None, "Start from this PEFT adapter; the reference is then that adapter.")

    def __post_init__(self) -> None:
        put_in_types(self, "lora.")
        if self.init_from is None:  # else the adapter's own
            for name, value in (("rank", 128), ("alpha", 256.0), ("targets", "auto")):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)
        require(self.rank is None or self.rank >= 1, "lora.rank", "an integer of at least 1", self.rank)
        require(self.alpha is None or self.alpha > 0, "lora.alpha", "a positive number", self.alpha)
        require(0 <= self.dropout < 1, "lora.dropout", "a number from 0 to below 1", self.dropout)
        require(
            self.targets is None
            or (
                len(self.targets) > 0
                and all(self.targets)
                and (isinstance(self.targets, list) or _is_pattern(self.targets))
            ),
            "lora.targets", "auto, names or a regular expression", self.targets,
        )  # fmt: skip
        require(  # LLaMA-Factory's words: as regular expressions they match nothing
            not (isinstance(self.targets, str) and re.fullmatch(r"all|[\w.]+(\s*,\s*[\w.]+)+", self.targets)),
            "lora.targets", "auto for every linear of the language model, or a list of names", self.targets,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str | list[str] = setting(
        "", "Pair file(s), or answers to learn for sft: .jsonl, .json, .parquet or a datasets folder."
    )
    eval: str | list[str] | None = setting(
        None,
        "Pair file(s) that are evaluated, never trained on; also folders of POPE or MMBench, which are asked and scored.",
    )
    eval_questions: int | None = setting(
        None, "First N questions only of each benchmark in eval (of POPE: of each split)."
    )
    eval_prompt_suffix: str | None = setting(
        None, "Line under each benchmark question; null is what `fasttrain eval` puts there, '' nothing."
    )
    image_root: str | None = setting(
        None, "Folder that image paths start from; the pair file's folder by default."
    )
    max_length: int = setting(3000, "Most tokens of prompt plus one completion, image tokens included.")
    overflow: Literal["error", "truncate", "drop"] = setting(
        "error", "For an overlong example: stop, cut its completions at the end, or leave its pair out."
    )
    on_bad_row: Literal["stop", "skip"] = setting(
        "stop", "stop: exit 2; skip: leave out, list in skipped.jsonl."
    )
    group_by: Literal["prompt", "image"] = setting(
        "prompt",
        "What runs once for all pairs that share it: the prompt, or its beginning up to the last image, for several questions about one image.",
    )
    limit_pairs: int | None = setting(
        None, "First N pairs (sft: examples) after shuffling, for data-scaling studies."
    )
    workers: int | Literal["auto"] = setting("auto", "Processes that prepare packs ahead of the step.")

    def __post_init__(self) -> None:
        put_in_types(self, "data.")
        for name, paths in (("data.train", self.train), ("data.eval", self.eval)):
            require(not (isinstance(paths, list) and "" in paths), name, "paths, none of them empty", paths)
        require(self.eval != "", "data.eval", "a path, several, or null", self.eval)
        require(self.max_length >= 2, "data.max_length", "an integer of at least 2", self.max_length)
        require(
            self.limit_pairs is None or self.limit_pairs >= 1,
            "data.limit_pairs",
            "at least 1",
            self.limit_pairs,
        )
        require(
            self.eval_questions is None or self.eval_questions >= 1,
            "data.eval_questions", "at least 1", self.eval_questions,
        )  # fmt: skip
        require(
            self.workers == "auto" or int(self.workers) >= 0,
            "data.workers",
            "auto or at least 0",
            self.workers,
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    kind: str | list[str] = setting("sigmoid", f"One of {', '.join(LOSS_KINDS)}; or a list of them.")
    weights: list[float] | None = setting(
        None, "One weight per kind when kind is a list; 1.0 each by default."
    )
    beta: float = setting(0.1, "Strength of the pull towards the reference.")
    label_smoothing: float = setting(
        0.0, "Assumed share of flipped labels; sigmoid then is conservative DPO."
    )
    f_divergence: str = setting("reverse_kl", f"One of {', '.join(F_DIVERGENCES)}.")
    f_alpha: float = setting(0.5, "Order of alpha_divergence; 1 is reverse_kl.")
    discopop_tau: float = setting(0.05, "discopop: how sharply the margin decides between its two losses.")
    simpo_gamma: float = setting(0.5, "simpo: the margin that is wanted.")
    ld_alpha: float | None = setting(
        None, "Length desensitisation: weight of tokens beyond the shorter answer."
    )
    use_weighting: bool = setting(
        False, "WPO: weight each pair by how likely the policy is to have written it."
    )

    router_aux_weight: float = setting(
        0.0,
        "Mixtures of experts: weight of the router's load-balancing loss in the loss; it is reported as aux_loss anyhow.",
    )

    @property
    def kinds(self) -> list[str]:
        return [self.kind] if isinstance(self.kind, str) else self.kind

    def __post_init__(self) -> None:
        put_in_types(self, "loss.")
        require(bool(self.kinds), "loss.kind", "a loss or a list of losses", self.kind)
        for kind in self.kinds:
            if kind not in LOSS_KINDS:
                raise UserError(
                    f"loss.kind: wanted one of {', '.join(LOSS_KINDS)}, got {kind!r}"
                    + (_NO_KINDS.get(kind) or did_you_mean(kind, list(LOSS_KINDS)))
                )
        require(
            self.weights is None or len(self.weights) == len(self.kinds),
            "loss.weights", f"{len(self.kinds)} number(s), one per kind", self.weights,
        )  # fmt: skip
        require(self.beta > 0, "loss.beta", "a positive number", self.beta)
        require(
            0 <= self.label_smoothing < 0.5, "loss.label_smoothing", "0 to below 0.5", self.label_smoothing
        )
        require(
            self.f_divergence in F_DIVERGENCES,
            "loss.f_divergence", f"one of {', '.join(F_DIVERGENCES)}", self.f_divergence,
        )  # fmt: skip
        require(self.discopop_tau > 0, "loss.discopop_tau", "a positive number", self.discopop_tau)
        require(self.ld_alpha is None or 0 <= self.ld_alpha <= 1, "loss.ld_alpha", "0 to 1", self.ld_alpha)
        weight = self.router_aux_weight
        require(0 <= weight < math.inf, "loss.router_aux_weight", "a number of at least 0", weight)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    output: str = setting("runs/dpo", "Run folder.")
    epochs: float = setting(3, "Passes over the pairs.")
    max_steps: int | None = setting(None, "Stop after this many optimizer steps, whatever epochs says.")
    pairs_per_step: int = setting(
        128, "A step takes whole groups until it holds at least this many pairs (sft: examples)."
    )
    tokens_per_pack: int | Literal["auto"] = setting("auto", "Most tokens in one forward pass.")
    share_prefix: bool = setting(True, "Run a prompt once for all its completions.")
    shuffle: bool = setting(True, "Shuffle the groups, anew every epoch.")
    learning_rate: float = setting(5.0e-5, "Peak learning rate.")
    projector_learning_rate: float = setting(
        2.0e-5, "Peak learning rate of the projector, where model.train_projector trains it."
    )
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", "After warm-up.")
    warmup_ratio: float = setting(0.03, "Share of all steps in which the learning rate rises.")
    warmup_steps: int | None = setting(
        None, "Steps in which the learning rate rises, instead of warmup_ratio."
    )
    min_rate: float = setting(0.0, "Where cosine and linear end, as a share of the peak rate.")
    weight_decay: float = setting(0.0, "Decoupled weight decay; never on biases, norms and embeddings.")
    grad_clip: float | None = setting(1.0, "Largest norm of the gradient; null: no clipping.")
    optimizer: Literal["adamw", "adamw_8bit"] = setting("adamw", "adamw_8bit needs bitsandbytes.")
    betas: list[float] = setting([0.9, 0.999], "AdamW's averages of the gradient and of its square.")
    eps: float = setting(1e-8, "AdamW's term beside the root of the second average.")
    gradient_checkpointing: bool | Literal["auto"] = setting(
        "auto", "Recompute activations in the backward pass; auto: only when memory needs it."
    )
    compile: bool = setting(
        False, "torch.compile the elementwise parts of the decoder: norms and activations. Not with ZeRO-3."
    )
    seed: int = setting(0, "Seed of order, adapter and dropout.")
    log_every: int = setting(1, "Steps between lines of metrics.jsonl.")
    eval_every: int | None = setting(None, "Steps between evaluations; the end of training always evaluates.")
    checkpoint_every: int | None = setting(50, "Steps between checkpoints; null: only the final one.")
    keep_checkpoints: int = setting(2, "How many checkpoints stay.")

    def __post_init__(self) -> None:
        put_in_types(self, "train.")
        require(bool(self.output), "train.output", "a folder", self.output)
        for name in ("max_steps", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"train.{name}", "null or at least 1", value)
        for name in ("pairs_per_step", "log_every", "keep_checkpoints"):
            require(
                getattr(self, name) >= 1, f"train.{name}", "an integer of at least 1", getattr(self, name)
            )
        require(self.epochs > 0, "train.epochs", "a positive number", self.epochs)
        require(  # every epoch's steps are counted before the first
            self.epochs <= _MOST_EPOCHS or self.max_steps is not None,
            "train.epochs", f"at most {_MOST_EPOCHS:,} where train.max_steps is null", self.epochs,
        )  # fmt: skip
        for name in ("learning_rate", "projector_learning_rate", "weight_decay"):
            require(getattr(self, name) >= 0, f"train.{name}", "a number of at least 0", getattr(self, name))
        require(0 <= self.warmup_ratio <= 1, "train.warmup_ratio", "0 to 1", self.warmup_ratio)
        steps, ratio = self.warmup_steps, self.warmup_ratio
        require(steps is None or steps >= 0, "train.warmup_steps", "null or at least 0", steps)
        require(
            steps is None or ratio in (0, TrainConfig.warmup_ratio),
            "train.warmup_steps", f"null with train.warmup_ratio {ratio}", steps,
        )  # fmt: skip
        require(0 <= self.min_rate <= 1, "train.min_rate", "0 to 1", self.min_rate)
        require(
            self.schedule != "constant" or not self.min_rate,
            "train.min_rate", "0 with train.schedule constant", self.min_rate,
        )  # fmt: skip
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "train.betas", "two numbers from 0 to below 1", self.betas,
        )  # fmt: skip
        require(self.eps > 0, "train.eps", "a positive number", self.eps)
        require(
            self.grad_clip is None or self.grad_clip > 0,
            "train.grad_clip",
            "a positive number, or null for no clipping",
            self.grad_clip,
        )
        require(0 <= self.seed < 2**63, "train.seed", "an integer from 0 to below 2^63", self.seed)
        require(
            self.tokens_per_pack == "auto" or 1 <= int(self.tokens_per_pack) < 2**31,
            "train.tokens_per_pack", "auto or 1 to below 2^31", self.tokens_per_pack,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    cache: str = setting(
        "auto", "Folder of the cached reference log-probs; auto: ~/.cache/fasttrain/reference."
    )

    def __post_init__(self) -> None:
        put_in_types(self, "reference.")
        require(bool(self.cache), "reference.cache", "auto or a folder", self.cache)


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    zero_stage: int | None = setting(None, "DeepSpeed ZeRO stage: null, 2 or 3.")
    deepspeed_config: str | None = setting(None, "A DeepSpeed JSON merged over ours.")

    def __post_init__(self) -> None:
        put_in_types(self, "distributed.")
        require(self.zero_stage in (None, 2, 3), "distributed.zero_stage", "null, 2 or 3", self.zero_stage)
        require(
            self.deepspeed_config is None or self.zero_stage is not None, "distributed.deepspeed_config",
            "null without distributed.zero_stage", self.deepspeed_config,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """A whole recipe. Nested sections are dataclasses; `lora=None` is full fine-tuning."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    track: list[str] = setting(["tensorboard"], f"Any of {', '.join(TRACKERS)}.")

    def __post_init__(self) -> None:
        self._check_sections()
        object.__setattr__(self, "track", fitted(self.track, list[str], "track"))
        require(bool(self.model.name), "model.name", "a hub id or a folder", self.model.name)
        require(bool(self.data.train), "data.train", "a pair file", self.data.train)
        for name in self.track:
            require(name in TRACKERS, "track", f"any of {', '.join(TRACKERS)}", name)
        rate = self.train.projector_learning_rate
        require(
            self.model.train_projector or rate == TrainConfig().projector_learning_rate,
            "train.projector_learning_rate", "no value without model.train_projector", rate,
        )  # fmt: skip
        require(
            self.train.eval_every is None or bool(self.data.eval),
            "train.eval_every", "null without data.eval", self.train.eval_every,
        )  # fmt: skip
        if self.lora is None and self.model.quantize:
            raise UserError("model.quantize: a quantised model cannot be fine-tuned in full (lora is null)")
        if self.train.compile and self.distributed.zero_stage == 3:
            raise UserError(
                "train.compile: wanted false with distributed.zero_stage 3, which swaps the weights under the layers, got true"
            )

    def _check_sections(self) -> None:
        """UserError for a section that is given as anything but its dataclass; `config_from_dict` reads plain values."""
        for about in dataclasses.fields(self):
            kind, value = about.default_factory, getattr(self, about.name)
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                optional = about.name == "lora"
                require(
                    isinstance(value, kind) or (optional and value is None),
                    about.name, f"a {kind.__name__}{' or None' if optional else ''}", value,
                )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
