"""Gives the demo's trained model the words of SteerLM's request: `python -m fasttrain.demo.more_words MODEL_FOLDER`.

The words are new to the model and stay so: each gets an embedding drawn at the spread of the trained ones, and the output row of
`<unk>`, which it never says. What it answered before it answers still; what the words mean is for SteerLM to teach it. Run on a
model whose vocabulary holds them already, nothing changes.
"""

import json
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

from fasttrain.demo.tiny_llava import build_processor

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"


def add_words(folder: Path, seed: int = 0) -> int:
    """How many words were added to the model in `folder`: tokenizer, rows of embedding and head, vocabulary size."""
    processor = build_processor()
    path = folder / "model.safetensors"
    weights = load_file(path)
    rows, width = weights[EMBEDDING].shape
    missing = len(processor.tokenizer) - rows
    if missing <= 0:
        return 0
    drawn = torch.randn(missing, width, generator=torch.Generator().manual_seed(seed))
    weights[EMBEDDING] = torch.cat([weights[EMBEDDING], weights[EMBEDDING].std() * drawn])
    unknown = processor.tokenizer.unk_token_id
    weights[HEAD] = torch.cat([weights[HEAD], weights[HEAD][unknown].expand(missing, -1)])
    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["vocab_size"] = rows + missing
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    processor.save_pretrained(folder)
    return missing


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    click.echo(f"{add_words(folder)} words added to {folder}")


if __name__ == "__main__":
    main()
