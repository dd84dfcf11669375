"""Sampling with a local Hugging Face model: prompt and image go through it once, whatever the number of samples.

The prompts of a batch are run without their last token; the key-value cache is then repeated once per sample
and `generate` goes on from there. Where images are not LLaVA-1.5's, or layers do not see all that went before,
`generate` runs the whole prompt of every sample, with all that the processor says about its images. Every sample has
a random generator of its own, so that its text does not depend on which others are drawn beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fasttrain_data.calls.failures import CallFailed
from fasttrain_data.completions.samples import Done, Drawn, Sample, SampleSettings, messages_of
from fasttrain_data.errors import UserError
from fasttrain_data.ids import content_hash

# torch is imported by the functions that use it; its types are not spelled here.
Tensor = Any
_ANY_LENGTH = 1 << 30
# All there is to say about text and LLaVA-1.5's images.
_INPUTS = ("input_ids", "attention_mask", "pixel_values")
_PROBE = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]


def load_sampler(
    settings: SampleSettings,
    *,
    adapter: Path | None = None,
    revision: str | None = None,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    batch_size: int = 4,
) -> LocalSampler:
    """A sampler of a model by name; its weights are loaded when the first sample is drawn.

    UserError if model, processor or adapter cannot be used.
    """
    try:
        import fasttrain.model.load as loading
        from fasttrain.answering.local import find_adapter, load_adapter
        from fasttrain.config import ModelConfig
        from fasttrain.devices import pick_device
        from fasttrain.errors import UserError as TrainerError
        from fasttrain.model.folder import find_folder
    except ImportError as error:
        raise UserError(
            f"sampling with a local model needs torch ({error}); use --server for a model elsewhere"
        ) from None
    try:
        config = ModelConfig(name=settings.model, revision=revision, dtype=dtype)
        folder = find_folder(config)
        model_config = loading.load_model_config(folder, config)
        processor = loading.load_processor(folder, config, loading.takes_images(model_config))
        adapter = None if adapter is None else find_adapter(adapter)
    except TrainerError as error:
        told = str(error).replace("model.name:", "--model:").replace("model.revision:", "--revision:")
        told = told.replace(", or model.trust_remote_code", "")
        raise UserError(told) from None

    def load() -> Any:
        try:
            model = loading.load_model(folder, config, model_config, pick_device())
            return model if adapter is None else load_adapter(model, adapter)
        except TrainerError as error:
            raise UserError(str(error).replace("model.name:", "--model:")) from None

    version = version_of(folder, model_config)
    if adapter is not None:
        version = content_hash(version, version_of(adapter, None))
    return LocalSampler(load, processor, settings, version=version, batch_size=batch_size)


def bos_of_adapter(adapter: Path | None) -> Any:
    """`SampleSettings.bos` as the run had it that made the adapter; "template" where nothing tells."""
    if adapter is None:
        return "template"
    try:
        from fasttrain.answering.local import bos_of_run
        from fasttrain.errors import UserError as TrainerError
    except ImportError:
        return "template"  # load_sampler says that torch is missing
    try:
        return bos_of_run(adapter)
    except TrainerError:
        return "template"  # and that this is no adapter


def version_of(folder: Path, config: Any) -> str:
    """The hub's commit, or for a local folder a hash of its configuration and of its weights.

    A model trained again into the same folder has files of the same names and sizes. Hashes of files are remembered.
    """
    commit = getattr(config, "_commit_hash", None)
    if commit:
        return str(commit)
    from fasttrain.errors import UserError as TrainerError
    from fasttrain.files import HashMemo, cache_root

    try:
        memo = HashMemo(cache_root() / "hashes.sqlite")
        weights = [(path.name, memo(path)) for path in sorted(folder.glob("*.safetensors"))]
        memo.save()
        memo.close()
    except TrainerError as error:
        raise UserError(str(error)) from None
    settings = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*config.json"))]
    return content_hash(weights, settings)


class LocalSampler:
    """A `Sampler` over a model in this process. load: gives the model, called once, when it is needed."""

    def __init__(
        self,
        load: Callable[[], Any],
        processor: Any,
        settings: SampleSettings,
        *,
        version: str | None = None,
        batch_size: int = 4,
    ) -> None:
        self._load, self.processor, self.settings = load, processor, settings
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.takes_images = hasattr(processor, "image_processor")
        self.model_version, self.batch_size = version, batch_size
        template = getattr(processor, "chat_template", None)
        if not template:
            raise UserError("--model: wanted a model with a chat template, got one without")
        bos = [] if settings.bos == "template" else [settings.bos]
        self.prompt_hash: str | None = content_hash(template, *bos)

    @cached_property
    def model(self) -> Any:
        return self._load()

    @cached_property
    def _goes_on_from_a_cache(self) -> bool:
        """Whether prompts can be run once for all their samples: text, or LLaVA-1.5's images, and layers that see it all."""
        from fasttrain.answering.local import shares_prompts

        known = not self.takes_images or self.processor.image_processor.model_input_names == ["pixel_values"]
        return known and shares_prompts(self.model) and not getattr(self.model, "_is_stateful", False)

    def note(self) -> str | None:
        """What to tell a user of a vision model whose prompts begin otherwise than transformers' processors begin them."""
        if not self.takes_images or self.settings.bos != "template":
            return None
        text = self.processor.apply_chat_template(_PROBE, add_generation_prompt=True, tokenize=False)
        if not self._tokenizer_begins(text):
            return None
        return (
            f"note: the chat template writes no {self.tokenizer.bos_token}, and prompts begin without it, as in TRL and vLLM; "
            f"transformers' processors put it in front of a chat, as --bos tokenizer does here"
        )

    def _tokenizer_begins(self, prompt: str) -> bool:
        """Whether the tokenizer puts a token in front that the prompt as rendered does not begin with."""
        from fasttrain.data.tokens import beginning

        return bool(beginning(self.tokenizer)) and not prompt.startswith(self.tokenizer.bos_token)

    def draw(self, samples: Iterator[list[Sample]], done: Done) -> None:
        """Batches of `batch_size` questions, each with all its missing samples."""
        while batch := list(itertools.islice(samples, self.batch_size)):
            for sample, drawn in zip(itertools.chain(*batch), self.draw_batch(batch), strict=True):
                done(sample, drawn)

    def draw_batch(self, batch: Sequence[Sequence[Sample]]) -> list[Drawn | CallFailed]:
        """The samples of several questions, flat and in order; one whose images are damaged, or that cannot be asked, has failures."""
        decoded = [self._prepared(samples[0]) for samples in batch]
        usable = [
            (samples, images)
            for samples, images in zip(batch, decoded, strict=True)
            if not isinstance(images, CallFailed)
        ]
        drawn = iter(self._generate(usable) if usable else ())
        return [
            images if isinstance(images, CallFailed) else next(drawn)
            for samples, images in zip(batch, decoded, strict=True)
            for _ in samples
        ]

    def _prepared(self, sample: Sample) -> list[Any] | CallFailed:
        """A question's decoded images, if its prompt can be rendered as well."""
        images = _decode_all(sample)
        try:
            self._prompt(sample)
        except CallFailed as why:
            return why
        return images

    def _generate(self, batch: Sequence[tuple[Sequence[Sample], list[Any]]]) -> list[Drawn | CallFailed]:
        """The samples of questions with their decoded images, flat and in order."""
        from fasttrain.answering.generic import neutral

        _ = self._ends  # read while the model has its own settings
        with neutral(self.model):
            return self._generate_neutrally(batch)

    def _generate_neutrally(
        self, batch: Sequence[tuple[Sequence[Sample], list[Any]]]
    ) -> list[Drawn | CallFailed]:
        if (
            self._positions is not None and len(batch) > 1
        ):  # how far a sample may go must not depend on its neighbours
            return [drawn for one in batch for drawn in self._generate_neutrally([one])]
        rows = [(sample, images) for samples, images in batch for sample in samples]
        drawn: dict[str, Drawn | CallFailed] = {}
        try:
            if self._goes_on_from_a_cache:
                return [*self._once(batch)]
            for with_images in (True, False):  # processors want an image for every prompt, or for none
                if some := [(sample, images) for sample, images in rows if bool(images) == with_images]:
                    drawn |= zip((sample.key for sample, _ in some), self._whole(some), strict=True)
        except CallFailed as why:  # of the one question that is here
            return [why] * len(rows)
        return [drawn[sample.key] for sample, _ in rows]

    @cached_property
    def _positions(self) -> int | None:
        """The most tokens that a sequence of the model can have; None where it goes on beyond any number."""
        from fasttrain.model.positions import why_too_long

        positions: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return positions if why_too_long(self.model, _ANY_LENGTH) else None

    def _room(self, inputs: dict[str, Any]) -> int:
        """How many tokens a sample may have; CallFailed if the prompt leaves none."""
        prompt, wanted = int(inputs["input_ids"].shape[1]), self.settings.max_new_tokens
        if self._positions is None:
            return wanted
        if prompt >= self._positions:
            what = f"wanted fewer than the model's {self._positions} positions, got {prompt} tokens"
            raise CallFailed("refused_request", what)
        return min(wanted, self._positions - prompt)

    def _whole(self, rows: Sequence[tuple[Sample, list[Any]]]) -> list[Drawn]:
        """Samples from prompts that are run whole, each for itself."""
        import torch

        prompts = [self._prompt(sample) for sample, _ in rows]
        with torch.inference_mode():
            inputs = self._encode(prompts, [images for _, images in rows] if rows[0][1] else [])
            output_ST = self.model.generate(
                **inputs,
                **self._generation(
                    [sample.seed for sample, _ in rows], self.model.device, self._room(inputs)
                ),
            )
        new_ST = output_ST[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._drawn(tokens) for tokens in new_ST]

    def _once(self, batch: Sequence[tuple[Sequence[Sample], list[Any]]]) -> list[Drawn]:
        """Samples from prompts that are run once for all of a question."""
        import torch

        prompts = [self._prompt(samples[0]) for samples, _ in batch]
        with torch.inference_mode():
            inputs = self._encode(prompts, [image for _, images in batch for image in images])
            inputs = {key: inputs[key] for key in _INPUTS if key in inputs}
            room = self._room(inputs)
            ids_BT = inputs.pop("input_ids")
            mask_BT = inputs.pop("attention_mask")
            cache = self._prefill(ids_BT, mask_BT, inputs)
            row_of_S = [row for row, (samples, _) in enumerate(batch) for _ in samples]
            rows_S = torch.tensor(row_of_S, device=ids_BT.device)
            cache.batch_select_indices(rows_S)
            output_ST = self.model.generate(
                input_ids=ids_BT[rows_S],
                attention_mask=mask_BT[rows_S],
                **{_cache_name(): cache},
                **self._generation(
                    [sample.seed for samples, _ in batch for sample in samples], ids_BT.device, room
                ),
            )
        new_ST = output_ST[:, ids_BT.shape[1] :].tolist()
        return [self._drawn(tokens) for tokens in new_ST]

    def _prompt(self, sample: Sample) -> str:
        """The rendered conversation; CallFailed where the template refuses it, as some do a system turn."""
        import jinja2

        messages: list[dict[str, Any]] = messages_of(sample.question, len(sample.images))
        if sample.images and not self.takes_images:
            raise UserError(f"--model: wanted a model that takes images, for question {sample.question.id}")
        if not self.takes_images:
            messages = [{**turn, "content": turn["content"][-1]["text"]} for turn in messages]
        try:
            text: str = self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            roles = ", ".join(str(turn["role"]) for turn in messages)
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            wanted = "roles that the model's chat template can render"
            raise CallFailed("refused_request", f"wanted {wanted}, got {roles} ({problem})") from None
        return text

    def _encode(self, prompts: list[str], images: list[Any]) -> dict[str, Any]:
        """Left-padded inputs on the model's device; nothing is added that neither the template nor --bos asks for."""
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        options = {
            "padding": True,
            "padding_side": "left",
            "return_tensors": "pt",
            "add_special_tokens": self.settings.bos == "tokenizer" and self._tokenizer_begins(prompts[0]),
        }
        if images:
            inputs = dict(self.processor(text=prompts, images=images, **options))
        else:
            inputs = {
                key: value for key, value in self.tokenizer(prompts, **options).items() if key in _INPUTS
            }
        dtype = next(self.model.parameters()).dtype
        moved = {key: value.to(self.model.device) for key, value in inputs.items() if hasattr(value, "to")}
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in moved.items()}

    def _prefill(self, ids_BT: Tensor, mask_BT: Tensor, images: dict[str, Tensor]) -> Any:
        """Key-value cache of all prompts but for their last token, from which `generate` starts."""
        from transformers import DynamicCache

        text_config = self.model.config.get_text_config()
        cache = DynamicCache(config=text_config)
        position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        self.model(
            input_ids=ids_BT[:, :-1],
            attention_mask=mask_BT[:, :-1],
            position_ids=position_BT[:, :-1],
            use_cache=True,
            logits_to_keep=1,
            **{_cache_name(): cache},
            **images,
        )
        return cache

    def _generation(self, seeds: list[int], device: Any, max_new_tokens: int) -> dict[str, Any]:
        """Arguments of `generate`: our sampler adds the randomness, so it is told to take the likeliest token."""
        settings = self.settings
        processors = []
        if settings.temperature > 0:
            processors.append(gumbel_sampler(seeds, settings.temperature, settings.top_p, device))
        return {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "logits_processor": processors,
            "eos_token_id": self._ends,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    @cached_property
    def _ends(self) -> list[int]:
        """Tokens that end an answer: the model's and the tokenizer's."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return sorted({token for token in [*ends, self.tokenizer.eos_token_id] if token is not None})

    def _drawn(self, tokens: list[int]) -> Drawn:
        ends = set(self._ends)
        length = next((at for at, token in enumerate(tokens) if token in ends), None)
        kept = tokens if length is None else tokens[:length]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Drawn(
            text=text,
            finish_reason="length" if length is None else "stop",
            tokens=len(kept) + (length is not None),
            model_version=self.model_version,
        )


def _cache_name() -> str:
    """What a model's forward calls its key-value cache: transformers renamed it in 5.24."""
    import transformers

    renamed = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
    return "cache" if renamed else "past_key_values"


def gumbel_sampler(seeds: Sequence[int], temperature: float, top_p: float, device: Any) -> Any:
    """A logits processor whose argmax is a sample: row s draws from its own generator, seeded with seeds[s].

    argmax(log p + Gumbel noise) is distributed as p; -log of an exponential variable is Gumbel noise.
    """
    import torch
    from transformers import LogitsProcessor, TopPLogitsWarper

    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    class Sampler(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            logit_SV = scores.float() / temperature
            if nucleus is not None:
                logit_SV = nucleus(input_ids, logit_SV)
            noise_SV = torch.empty_like(logit_SV)
            for row, generator in enumerate(generators):
                noise_SV[row].exponential_(generator=generator)
            return logit_SV - noise_SV.log()

    return Sampler()


def _decode_all(sample: Sample) -> list[Any] | CallFailed:
    """A question's images; the failure of its samples, which names the image, where one cannot be decoded."""
    from fasttrain.data.images import open_image

    images = []
    for name, image in zip(sample.question.images, sample.images, strict=True):
        try:
            images.append(open_image(image.content))
        except ValueError as error:
            return CallFailed("bad_image", f"{name}: cannot be decoded: {error}")
    return images
