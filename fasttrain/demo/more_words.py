"""Gives a copy of the demo's model the words of SteerLM's request, which its charts do not use.

The words are new to the model and stay so: each gets an embedding drawn at the spread of the trained ones, and the output row of
`<unk>`, which it never says. What it answered before it answers still; what the words mean is for SteerLM to teach it.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, pre_tokenizers

from fasttrain.demo.tiny_llava import TOKEN_PATTERN
from fasttrain_data.pairs.steering import steering_text

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"


def with_request_words(model: Path, folder: Path, seed: int = 0) -> Path:
    """A copy of `model` in `folder` that knows every word of a request for scores; one that is there already is kept."""
    if (folder / "config.json").exists():  # written last
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("config.json"))
    added = _add_to_tokenizer(folder / "tokenizer.json")
    weights = load_file(folder / "model.safetensors")
    rows, width = weights[EMBEDDING].shape
    drawn = torch.randn(added, width, generator=torch.Generator().manual_seed(seed))
    weights[EMBEDDING] = torch.cat([weights[EMBEDDING], weights[EMBEDDING].std() * drawn])
    unknown = 0  # the tokenizer's first entry
    weights[HEAD] = torch.cat([weights[HEAD], weights[HEAD][unknown].expand(added, -1)])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["vocab_size"] = rows + added
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _add_to_tokenizer(path: Path) -> int:
    """How many words were added behind the others of a word-level tokenizer's file."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    before = len(vocabulary)
    splitter = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated")
    for score in range(5):
        request = steering_text([score] * 5).replace(" ", "▁")
        for piece, _ in splitter.pre_tokenize_str(request):
            vocabulary.setdefault(piece, len(vocabulary))
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")
    return len(vocabulary) - before
