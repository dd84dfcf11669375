"""docs/kernels.md shows what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fasttrain_kernels
from fasttrain_kernels import KINDS, SharedPrefixLayout


def test_the_page_names_every_kind_and_imports_what_the_package_has(repository: Path) -> None:
    text = (repository / "docs" / "kernels.md").read_text()
    for kind in KINDS:
        assert f"`{kind}`" in text, kind
    for names in re.findall(r"from fasttrain_kernels import \(?([\w,\s]+)", text):
        for name in re.findall(r"\w+", names.partition("\n\n")[0]):
            if name in ("import", "from", "class"):
                break
            assert hasattr(fasttrain_kernels, name), name
    for name in re.findall(r"`([A-Z]+_[A-Z_]+)`", text):
        assert name in fasttrain_kernels.__all__


def test_the_trl_lines_on_the_page_are_the_examples(repository: Path) -> None:
    squeeze = lambda text: re.sub(r"\s+", "", text)  # noqa: E731
    page = (repository / "docs" / "kernels.md").read_text()
    body = page.partition("        out = linear_logprob(\n")[2].partition("out.top1\n")[0]
    example = squeeze((repository / "examples" / "kernels_trl.py").read_text().replace("# fmt: skip", ""))
    assert body and squeeze(body) in example


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
def test_the_pages_attention_in_a_hugging_face_model_gives_the_log_probs_of_separate_sequences(
    repository: Path, family: str
) -> None:
    import transformers

    blocks = re.findall(r"```python\n(.*?)```", (repository / "docs" / "kernels.md").read_text(), re.DOTALL)
    (block,) = (text for text in blocks if "AttentionInterface" in text)
    sizes = {"vocab_size": 301, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}  # fmt: skip
    windowed = {} if family == "Llama" else {"sliding_window": 9}
    config = getattr(transformers, f"{family}Config")(
        **sizes, **windowed, **({"final_logit_softcapping": None} if family == "Gemma2" else {})
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    layout = SharedPrefixLayout.from_groups([(21, [4, 12, 1]), (1, [2]), (3, [15, 1])])
    ids = torch.randint(3, 301, (1, layout.tokens))
    names: dict[str, Any] = {name: getattr(fasttrain_kernels, name) for name in fasttrain_kernels.__all__}
    with torch.no_grad():
        exec(block, names | {"torch": torch, "model": model, "layout": layout, "ids": ids}, names)
        model.set_attn_implementation("eager")
        for found, (start, prompt, own, length) in zip(names["logps"], layout.completions(), strict=True):
            one = torch.cat([ids[:, start : start + prompt], ids[:, own : own + length]], 1)
            logp_TV = model(one, use_cache=False).logits[0, prompt - 1 : -1].log_softmax(-1)
            assert abs(found - logp_TV.gather(1, one[0, prompt:, None]).sum()) < 1e-4


def test_all_is_sorted_and_every_name_in_it_exists() -> None:
    names = fasttrain_kernels.__all__
    assert len(set(names)) == len(names)
    for name in names:
        assert hasattr(fasttrain_kernels, name)
    for name in ("linear_logprob", "label_logprob", "preference_loss", "shared_prefix_attention", "SharedPrefixLayout",
                 "FusedLinearPreferenceLoss", "backend_for"):  # fmt: skip
        assert name in names
