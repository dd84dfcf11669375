"""DPO in a plain PyTorch loop around a Hugging Face model: no trainer, no logits, no reference model in memory.

    python examples/kernels_hf_loop.py [MODEL] [STEPS]

Without MODEL a tiny random Llama is aligned to random preferences, to show the moving parts; the loss falls from ln 2.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fasttrain_kernels import FusedLinearPreferenceLoss, preference_logps


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return LlamaForCausalLM(config)


def batch(
    model: LlamaForCausalLM, pairs: int = 4, prompt: int = 6, answer: int = 10
) -> tuple[Tensor, Tensor]:
    """Token ids (2P, T), chosen answers in the first half, and shifted labels with the prompt at -100."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, model.config.vocab_size, (pairs, prompt), generator=generator)
    answers = torch.randint(0, model.config.vocab_size, (2 * pairs, answer), generator=generator)
    ids = torch.cat([prompts.repeat(2, 1), answers], 1)
    labels = ids[:, 1:].clone()
    labels[:, : prompt - 1] = -100
    return ids, labels


def align(model: LlamaForCausalLM, ids: Tensor, labels: Tensor, steps: int) -> list[float]:
    """Run DPO steps and return their losses."""
    loss = FusedLinearPreferenceLoss(kind="sigmoid", beta=0.1)
    head = model.get_output_embeddings().weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    rows = torch.full((ids.shape[0],), labels.shape[1], device=ids.device)

    # Once, before training: the reference's log-probs. Ignored rows add 0.
    with torch.no_grad():
        hidden = model.model(ids[:, :-1]).last_hidden_state
        reference = preference_logps(hidden.flatten(0, 1), head, labels.flatten(), rows)
    ref_chosen, ref_rejected = reference.chunk(2)

    losses = []
    for _ in range(steps):
        hidden = model.model(ids[:, :-1]).last_hidden_state
        out = loss(hidden, head, labels, ref_chosen, ref_rejected)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        print(f"loss {losses[-1]:.4f}  margin {(out.chosen_reward - out.rejected_reward).mean():+.4f}")
    return losses


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]) if len(sys.argv) > 1 else tiny_llama()
    align(model, *batch(model), steps=int(sys.argv[2]) if len(sys.argv) > 2 else 5)


if __name__ == "__main__":
    main()
