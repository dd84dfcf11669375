"""The policy: a Hugging Face model with our attention and our head, from a pack to one log-prob per completion token."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fasttrain.data.batch import PackBatch
from fasttrain.errors import UserError
from fasttrain.model.attention import SHARED, check_attention
from fasttrain.model.head import LogprobHead, check_head, install_head, trunk
from fasttrain.model.image_mistakes import image_mistakes
from fasttrain.model.last_layer import trim_last_layer
from fasttrain.model.lora import language_model
from fasttrain.model.no_waiting import embed_with_images, images_are_alike, trust_placeholders
from fasttrain.model.routing import find_top_k, router_sums
from fasttrain_kernels import SharedPrefixLayout


@dataclass
class Counts:
    """What ran, counted where it ran."""

    images: int = 0
    decoder_tokens: int = 0
    head_rows: int = 0
    passes: int = 0


class PassOutput(NamedTuple):
    """What the head returns for N rows (see `linear_logprob`), and the router's sums over the pass (`routing.py`)."""

    logprob: Tensor
    entropy: Tensor | None = None
    log_p2: Tensor | None = None
    top1: Tensor | None = None
    mean_logit: Tensor | None = None
    router_V: Tensor | None = None


class Policy(nn.Module):
    """Wraps a causal LM, with images or without. Forward takes a PackBatch on the model's device and returns the
    head's output for its N rows.

    attention: the backend of attention over shared prompts, "auto" for the best that can run. top_k: experts a token goes
    to, in mixtures whose load-balancing loss is known once `check` has run.
    """

    def __init__(self, model: Any, attention: str = "auto") -> None:
        super().__init__()
        self.model = model
        self.attention = attention
        self.shared = False
        self._images_fit = (
            False  # a pass has shown that every image makes as many features as it has placeholders
        )
        self._images_passed = False  # the model has run on what its processor makes of images
        self.ordinary_attention = model.config.get_text_config()._attn_implementation
        self.head: LogprobHead
        object.__setattr__(self, "head", install_head(model))  # registered once, inside the model
        trim_last_layer(language_model(model))
        # kept here: under ZeRO-3 even asking a weight for its device inside a forward gathers it, on the ranks that ask
        self.device: torch.device = self.head.weight.device
        self.counts = Counts()
        self.top_k: int | None = None
        self._routed: Tensor | None = None  # the router's sums over the pass that is running
        # set where ranks that train a model with images must all run the same modules (ZeRO), and every pass have a gradient
        self.blank: dict[str, Tensor] | None = None
        # set where no layer may run once for every image (ZeRO-3)
        self.two_blanks: dict[str, Tensor] | None = None
        self.images_train_alone = False  # nothing behind the images' features trains

    def check(self) -> None:
        """Refuse a model whose head does something our head does not; find out how a mixture of experts routes."""
        shared = self.shared
        self.set_shared(False)
        check_head(self.model, self.head, self.device)
        self.top_k = find_top_k(self.model, self.device)
        self.set_shared(shared)

    def check_images(self) -> None:
        """Refuse a layer that runs once for every image of a pass: ZeRO-3 gathers its weights that often, and ranks with other
        numbers of images would wait for each other for ever."""
        if self.blank is None or self.two_blanks is None:
            return
        shared = self.shared
        self.set_shared(False)
        once, twice = self._entered(self.blank), self._entered(self.two_blanks)
        self.set_shared(shared)
        if name := next((name for name, count in twice.items() if count > once[name]), None):
            name = name.replace(".modules_to_save.default", "")  # peft's copy of what is trained whole
            raise UserError(
                f"distributed.zero_stage: wanted 2 for {type(self.model).__name__}, whose {name} runs once for every image, so that "
                "ranks with other numbers of images would wait for each other, got 3"
            )

    @torch.no_grad()
    def _entered(self, blank: dict[str, Tensor]) -> Counter[str]:
        """How often a pass with these images enters each module that has weights."""
        entered: Counter[str] = Counter()
        hooks = [
            module.register_forward_pre_hook(lambda module, given, name=name: entered.update([name]))
            for name, module in self.model.named_modules()
            if any(True for _ in module.parameters(recurse=False))
        ]
        try:
            self._decode(torch.zeros(1, dtype=torch.int64, device=self.device), {}, 0, blank)
        finally:
            for hook in hooks:
                hook.remove()
        return entered

    def set_shared(self, shared: bool) -> None:
        """Run prompts once for all their completions, or every completion as an ordinary sequence."""
        if shared == self.shared:
            return
        self.shared = shared
        name = SHARED if shared else self.ordinary_attention
        self.model.set_attn_implementation(
            {"text_config": name} if hasattr(self.model.config, "text_config") else name
        )

    def forward(self, batch: PackBatch, routing: bool = False, **wants: bool) -> PassOutput:
        """Log-probs of the batch's N completion tokens, fp32, in order (`.logprob`; what `wants` asks the head for).

        routing: also a mixture's router sums over the batch's tokens, each counted as often as `uses_T` says.
        """
        if batch.shared != self.shared:
            raise ValueError(f"wanted a batch with shared={self.shared}, got shared={batch.shared}")
        routing = routing and self.top_k is not None
        hidden = self._hidden_shared if batch.shared else self._hidden_separate
        self._routed = None
        hidden_ND = hidden(batch, routing)
        if batch.scored_N is not None:
            hidden_ND = hidden_ND.index_select(0, batch.scored_N)
        router_V, self._routed = self._routed, None
        self.counts.head_rows += len(batch.target_N)
        self.counts.passes += 1
        return PassOutput(**self.head.score(hidden_ND, batch.target_N, **wants)._asdict(), router_V=router_V)

    def _hidden_shared(self, batch: PackBatch, routing: bool) -> Tensor:
        layout = SharedPrefixLayout.from_groups(batch.layout, batch.both_ways)
        if layout.bidirectional:
            check_attention(
                self.attention, self.model.config, self.device, self.model.dtype, bidirectional=True
            )
        inputs = dict(batch.inputs[0])
        if "position_ids" not in inputs:
            inputs["position_ids"] = layout.position_ids(self.device)[None]
        self.counts.images += batch.images
        backend = None if self.attention == "auto" else self.attention
        hidden_TD = self._decode(
            batch.input_ids_T,
            inputs,
            batch.images,
            blank=self._blank_for(batch, batch.images),
            uses_T=batch.uses_T if routing else None,
            shared_prefix_layout=layout,
            shared_prefix_backend=backend,
        )
        return hidden_TD.index_select(0, layout.predictor_rows(self.device))

    def _hidden_separate(self, batch: PackBatch, routing: bool) -> Tensor:
        """The same rows from one ordinary causal pass per completion: no packing, no attention of ours."""
        rows, start = [], 0
        for (prompt, completions), images, inputs in zip(
            batch.layout, batch.images_per_run, batch.inputs, strict=True
        ):
            length = prompt + completions[0]
            self.counts.images += images
            ids_T = batch.input_ids_T[start : start + length]
            uses_T = batch.uses_T[start : start + length] if routing else None
            hidden_TD = self._decode(
                ids_T, inputs, images, blank=self._blank_for(batch, images), uses_T=uses_T
            )
            rows.append(hidden_TD[prompt - 1 : length - 1])
            start += length
        return torch.cat(rows) + self._idle_passes(batch)

    def _idle_passes(self, batch: PackBatch) -> Tensor | float:
        """The passes that another rank's pack has more, at weight zero."""
        idle: Tensor | float = 0.0
        for _ in range(batch.pack.passes - len(batch.layout)):
            ids_T = torch.zeros_like(batch.input_ids_T[:1])
            idle = idle + self._decode(ids_T, {}, 0, blank=self._blank_for(batch, 0)).sum() * 0
        return idle

    def _blank_for(self, batch: PackBatch, images: int) -> dict[str, Tensor] | None:
        """What a pass with so many images of its own runs tower and projector on, where DeepSpeed wants every pass to run them."""
        wanted = batch.pack.images or self.images_train_alone
        return self.blank if wanted and not images else None

    @property
    def embeddings_of_layers(self) -> nn.Module | None:
        """Gemma 4's second embeddings, of every layer; before them a pass reads the weight of the first outside of these."""
        return getattr(getattr(trunk(self.model), "language_model", None), "embed_tokens_per_layer", None)

    @contextlib.contextmanager
    def _blank_images(self, blank: dict[str, Tensor]) -> Iterator[None]:
        """Run vision tower and projector on blank images, at weight zero, as other ranks run them on theirs.

        What comes out is added to the embeddings, where features are put in place of image tokens: DeepSpeed expects
        modules and gradients in the same order on all ranks. Before the features Gemma 4 embeds tokens for every layer too.
        """
        dtype, device = self.model.dtype, self.device
        inputs = {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in blank.items()
        }

        def add_nothing(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
            hook.remove()
            found = trunk(self.model).get_image_features(**inputs, return_dict=True)
            features = getattr(found, "pooler_output", found)
            deeper = getattr(found, "deepstack_features", None) or []  # Qwen3-VL's, for its first layers
            parts = [part for part in tree_leaves([features, deeper]) if isinstance(part, Tensor)]
            return embedded + torch.stack([part.sum() for part in parts]).sum() * 0

        last = self.embeddings_of_layers or self.model.get_input_embeddings()
        hook = last.register_forward_hook(add_nothing)
        try:
            yield
        finally:
            hook.remove()

    def _decode(
        self, ids_T: Tensor, inputs: dict[str, Tensor], images: int, blank: dict[str, Tensor] | None = None,
        uses_T: Tensor | None = None, **extra: Any,
    ) -> Tensor:  # fmt: skip
        """Hidden states (T, D), whole in the rows that predict (`last_layer.py`); with `uses_T` the router's sums are added to
        those of this pass."""
        dtype = self.model.dtype
        if uses_T is not None:
            extra["output_router_logits"] = True
        base = trunk(self.model)
        alike = bool(images) and images_are_alike(base, inputs)
        # DeepSpeed wants modules called in the same order on all ranks, also on those whose pack has no image
        ours = alike and self._images_fit and self.blank is None
        for name, value in inputs.items():
            extra[name] = value.to(dtype) if value.is_floating_point() else value
        self.counts.decoder_tokens += len(ids_T)
        with (
            image_mistakes(self.model, ids_T, images, self._images_passed),
            contextlib.nullcontext() if blank is None else self._blank_images(blank),
        ):
            if ours:
                extra["inputs_embeds"] = embed_with_images(base, ids_T, extra.pop("pixel_values"))
            else:
                extra["input_ids"] = ids_T[None]
            out = base(use_cache=False, return_dict=True, **extra)
        self._images_passed |= bool(images)
        if alike and not self._images_fit:
            self._images_fit = True
            if self.blank is not None:
                trust_placeholders(base)
        if uses_T is not None:
            assert self.top_k is not None
            sums_V = router_sums(out.router_logits, uses_T, self.top_k)
            self._routed = sums_V if self._routed is None else self._routed + sums_V
        return out.last_hidden_state[0]
