"""What a processor writes in place of an image: how many tokens, and what around them, for images of given sizes."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fasttrain.errors import UserError

# A processor that writes the same for all of these writes the same for every image.
_PROBES = ((64, 48), (37, 123), (1500, 900), (700, 2000))


def placeholder(processor: Any) -> str:
    """What chat templates write for an image: the token that is repeated in its place, or one of its own (Qianfan-OCR)."""
    return str(getattr(processor, "image_placeholder_token", None) or processor.image_token)


def text_of_images(processor: Any, count: int) -> str:
    """A text that the processor takes with so many images and nothing else."""
    one = placeholder(processor)
    if type(processor).__name__ == "HunYuanVLProcessor":  # it refuses images without their marks
        one = f"{processor.image_start_token}{one}{processor.image_end_token}"
    return " ".join([one] * count)


def _unset(processor: Any) -> str:
    """Which of a processor's own settings have no value: files that old versions of transformers wrote lack some."""
    settings = [
        name for name in inspect.signature(type(processor).__init__).parameters if name != "chat_template"
    ]
    unset = [name for name in settings if getattr(processor, name, "") is None]
    return f" (processor_config.json sets no {', '.join(unset)})" if unset else ""


@dataclass(frozen=True)
class Expansion:
    """The text in place of one image, every run of image tokens written as one token, and the lengths of the runs."""

    text: str
    runs: tuple[int, ...]


class Placeholders:
    """Replaces image placeholders in rendered prompts as the processor would, from the sizes of the images alone.

    token: the placeholder that chat templates write. feature_token(_id): the token in whose place the model puts image
    features, the same one in most families. The text of an image is the processor's own, made from a blank image.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.token = placeholder(processor)
        kind = type(processor).__name__
        self._around = processor.fake_image_token if kind == "Idefics2Processor" else None
        self._arrays = (
            "np" if kind == "Ovis2Processor" else None
        )  # it counts on arrays, which few others can always make
        self.fixed: Expansion | None = None
        self._of_sizes = functools.lru_cache(maxsize=65536)(self._expansions)
        try:
            texts = [self._texts((size,))[0] for size in _PROBES]
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 (it may be anything: what a processor wants besides text and images)
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"model.name: {type(processor).__name__} does not take a text and its images: {problem}{_unset(processor)}"
            ) from None
        self.feature_token = self._most_frequent(texts[0])
        self.feature_token_id: int = self.tokenizer.convert_tokens_to_ids(self.feature_token)
        if len(set(texts)) == 1:
            self.fixed = self._collapse(texts[0])

    @property
    def reserved(self) -> tuple[str, ...]:
        """Tokens that neither questions nor answers may hold."""
        return tuple(dict.fromkeys((self.token, self.feature_token)))

    def expand(self, text: str, sizes: Sequence[tuple[int, int]] | None) -> tuple[str, list[int]]:
        """The text with its placeholders replaced, and how often each of its feature tokens is to be repeated.

        sizes: (width, height) of the text's images, in order; None will do where every size gives the same.
        """
        pieces = text.split(self.token)
        images = len(pieces) - 1
        if self.fixed is not None:
            expansions = [self.fixed] * images
        else:
            sizes = sizes or ()
            if len(sizes) != images:
                raise ValueError(f"wanted the sizes of {images} images, got {sizes}")
            expansions = list(self._of_sizes(tuple(sizes))) if images else []
        out = [pieces[0]]
        runs: list[int] = []
        for piece, expansion in zip(pieces[1:], expansions, strict=True):
            out += [expansion.text, piece]
            runs += expansion.runs
        return self._join("".join(out)), runs

    def _join(self, expanded: str) -> str:
        """What Idefics2's processor does around images: one token between two of them, a space before a word that follows."""
        if self._around is None:
            return expanded
        between = expanded.replace(self._around * 2, self._around)
        return re.sub(f"{re.escape(self._around)}(?=[^\\s<])", f"{self._around} ", between)

    def _expansions(self, sizes: tuple[tuple[int, int], ...]) -> tuple[Expansion, ...]:
        return tuple(self._collapse(text) for text in self._texts(sizes))

    def _collapse(self, text: str) -> Expansion:
        token = self.feature_token
        pattern = f"(?:{re.escape(token)})+"
        runs = tuple(len(match) // len(token) for match in re.findall(pattern, text))
        return Expansion(re.sub(pattern, lambda match: token, text), runs)

    def _texts(self, sizes: tuple[tuple[int, int], ...]) -> list[str]:
        from PIL import Image

        images = [Image.new("RGB", size) for size in sizes]
        inputs = self.processor(
            images=[images], text=[text_of_images(self.processor, len(images))], add_special_tokens=False, return_text_replacement_offsets=True,
            return_tensors=self._arrays,
        )  # fmt: skip
        if inputs.get("text_replacement_offsets"):
            return [entry["replacement"] for entry in inputs["text_replacement_offsets"][0]]
        return [self._text_of_ids(image) for image in images]

    def _text_of_ids(self, image: Any) -> str:
        """For processors that do not tell what they replaced: their token ids for a placeholder, if all are one token, or that and
        the one that Idefics2 has around images."""
        ids = self.processor(images=[[image]], text=[self.token], add_special_tokens=False)["input_ids"][0]
        tokens = self.tokenizer.convert_ids_to_tokens([i for i in ids if i != self.tokenizer.bos_token_id])
        if not tokens or not {self.token} <= set(tokens) <= {self.token, self._around}:
            raise UserError(
                f"model.name: wanted a processor that tells what it writes in place of an image, got {type(self.processor).__name__} "
                f"with {len(tokens)} tokens and no account of them"
            )
        return "".join(tokens)

    def _most_frequent(self, text: str) -> str:
        ids = [
            *getattr(self.processor, "image_token_ids", []),
            getattr(self.tokenizer, "image_token_id", None),
        ]
        known = [self.token, *self.tokenizer.convert_ids_to_tokens([i for i in ids if i is not None])]
        if any(token in text for token in known):
            return max(known, key=text.count)
        # Ovis 2 names its token nowhere
        written = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return str(self.tokenizer.convert_ids_to_tokens(max(written, key=written.count)))
