"""Questions seen before: exact and near duplicates on the same image, overlap with evaluation files."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from fasttrain_data.ids import content_hash
from fasttrain_data.image_files import BadImage, find_image, read_image
from fasttrain_data.questions.evaluation import Asked, read_evaluation
from fasttrain_data.questions.readers import Draft
from fasttrain_data.questions.text import normal_form, similarity, trigrams
from fasttrain_data.spill import SeenKeys, Spill

_LATEST = 16
_SHARED = 5  # more leave fewer sets to be compared, and look up longer lists
_COCO = re.compile(r"^coco_(?:train|val|test)\d{4}_")


def image_key(name: str) -> str:
    """An image's identity by name: no folder, no suffix, no case, COCO's split prefix dropped."""
    return _COCO.sub("", Path(name).stem.casefold())


class _Asked:
    """The earlier questions about the same images; near ones are looked for among those that can be near.

    A set whose Jaccard index with another is `near` or more lacks so few of its elements that any few more of them hold a
    shared one (prefix filtering, Chaudhuri et al. 2006), and some more of them hold _SHARED: the rarest are looked up.
    """

    def __init__(self, near: float, earlier: Iterable[str]) -> None:
        self.near, self.normals = near, set[str]()
        self._grams: list[frozenset[tuple[str, ...]]] = []
        self._with: dict[tuple[str, ...], list[int]] = {}
        for normal in earlier:
            self.add(normal)

    def add(self, normal: str) -> None:
        self.normals.add(normal)
        if self.near == 1:
            return
        grams = trigrams(normal)
        for gram in grams:
            self._with.setdefault(gram, []).append(len(self._grams))
        self._grams.append(grams)

    def has_near(self, normal: str) -> bool:
        grams = trigrams(normal)
        found = sorted((self._with.get(gram, []) for gram in grams), key=len)
        least = math.ceil(self.near * len(grams) - 1e-9)
        shared = min(least, _SHARED)
        counted = Counter(itertools.chain.from_iterable(found[: len(grams) - least + shared]))
        candidates = (number for number, count in counted.items() if count >= shared)
        return any(similarity(grams, self._grams[number]) >= self.near for number in candidates)


class Duplicates:
    """Finds questions already asked about the same images: the same files, or where one is missing, the same names.

    near: Jaccard index of word trigrams from which two questions about one image count as the same; 1 keeps
    all but those whose normal forms are equal. A text-only question is compared by its normal form alone.
    Questions are kept on disk, those about the latest images in memory too.
    """

    def __init__(self, near: float) -> None:
        self.near = near
        self._spill = Spill(
            "CREATE TABLE asked (image BLOB, normal TEXT)", "CREATE INDEX by_image ON asked (image)"
        )
        self._text_only = SeenKeys()
        self._latest: dict[bytes, _Asked] = {}

    def verdict(self, draft: Draft, files: Sequence[Path | None]) -> str | None:
        """`duplicate`, `near duplicate` or None; None also remembers the question. files: the images that exist."""
        normal = normal_form(" ".join([turn.text for turn in draft.history] + [draft.question]))
        if not draft.images:
            return None if self._text_only.add(content_hash(normal)) else "duplicate"
        images = [
            ["file", str(file)] if file else ["name", image_key(name)]
            for name, file in zip(draft.images, files, strict=True)
        ]
        key = bytes.fromhex(content_hash(images))
        asked = self._asked_about(key)
        if normal in asked.normals:
            return "duplicate"
        if asked.has_near(normal):
            return "near duplicate"
        asked.add(normal)
        self._spill.database.execute("INSERT INTO asked VALUES (?, ?)", (key, normal))
        return None

    def _asked_about(self, key: bytes) -> _Asked:
        asked = self._latest.pop(key, None)
        if asked is None:
            rows = self._spill.database.execute("SELECT normal FROM asked WHERE image = ?", (key,))
            asked = _Asked(self.near, (normal for (normal,) in rows))
            if len(self._latest) >= _LATEST:
                del self._latest[next(iter(self._latest))]
        self._latest[key] = asked
        return asked

    def close(self) -> None:
        self._spill.close()
        self._text_only.close()


class Overlap:
    """Images and text-only questions of evaluation files.

    An image is the same when its bytes are, or, where one of the two files is not at hand, when its name is.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._digests_by_name: dict[str, set[str]] = {}
        self._nameless: set[str] = set()
        self._texts: set[str] = set()
        self.digests: set[str] = set()
        self.notes: list[str] = []
        for path in files:
            unread: Counter[str] = Counter()
            for asked in read_evaluation(path):
                self._learn(asked, path.parent)
                unread[asked.unread] += 1
            del unread[""]
            self.notes += [
                f"note: {path}: not looked for: {count:,} ({why})" for why, count in unread.items()
            ]

    def _learn(self, asked: Asked, folder: Path) -> None:
        self.digests.update(asked.digests)
        if not asked.names and not asked.digests and asked.question:
            self._texts.add(normal_form(asked.question))
        for name in asked.names:
            key = image_key(name)
            try:
                digest = read_image(find_image(folder, name)).sha256
            except BadImage:
                self._nameless.add(key)  # only its name is known
                continue
            self.digests.add(digest)
            self._digests_by_name.setdefault(key, set()).add(digest)

    def reason(self, draft: Draft, files: Sequence[Path | None]) -> str | None:
        """What overlaps, judged by names; `files` are the draft's images where they exist."""
        for name, file in zip(draft.images, files, strict=True):
            key = image_key(name)
            if key in self._nameless or (key in self._digests_by_name and file is None):
                return f"image {name} is in an evaluation file"
        if not draft.images and normal_form(draft.question) in self._texts:
            return "the question is in an evaluation file"
        return None
