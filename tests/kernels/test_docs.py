"""docs/kernels.md shows what exists."""

from __future__ import annotations

import re
from pathlib import Path

import fasttrain_kernels
from fasttrain_kernels import KINDS


def test_the_page_names_every_kind_and_imports_what_the_package_has(repository: Path) -> None:
    text = (repository / "docs" / "kernels.md").read_text()
    for kind in KINDS:
        assert f"`{kind}`" in text, kind
    for names in re.findall(r"from fasttrain_kernels import \(?([\w,\s]+)", text):
        for name in re.findall(r"\w+", names.partition("\n\n")[0]):
            if name in ("import", "from", "class"):
                break
            assert hasattr(fasttrain_kernels, name), name


def test_the_trl_lines_on_the_page_are_the_examples(repository: Path) -> None:
    squeeze = lambda text: re.sub(r"\s+", "", text)  # noqa: E731
    page = (repository / "docs" / "kernels.md").read_text()
    body = page.partition("        out = linear_logprob(\n")[2].partition("out.top1\n")[0]
    example = squeeze((repository / "examples" / "kernels_trl.py").read_text().replace("# fmt: skip", ""))
    assert body and squeeze(body) in example


def test_all_is_sorted_and_every_name_in_it_exists() -> None:
    names = fasttrain_kernels.__all__
    assert len(set(names)) == len(names)
    for name in names:
        assert hasattr(fasttrain_kernels, name)
    for name in ("linear_logprob", "label_logprob", "preference_loss", "shared_prefix_attention", "SharedPrefixLayout",
                 "FusedLinearPreferenceLoss", "backend_for"):  # fmt: skip
        assert name in names
