"""Other people's trainers on our kernels: the examples of docs/kernels.md run and change no result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Two DPO steps of TRL on a tiny model, with its own head and with ours; every loss of the run, as JSON.
TRL_RUN = """
import json, sys
sys.path.insert(0, "examples")
import kernels_trl
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

rows = [{"prompt": f"Say {i}", "chosen": f"{i} it is, then", "rejected": "no" * (i + 1)} for i in range(8)]

def run(folder):
    args = DPOConfig(output_dir=folder, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, bf16=False,
                     use_cpu=True, report_to=[], logging_steps=1, save_strategy="no", gradient_checkpointing=False,
                     loss_type=["sigmoid", "ipo"], loss_weights=[1.0, 0.5], use_weighting=True, seed=0)
    trainer = DPOTrainer(sys.argv[1], args=args, train_dataset=Dataset.from_list(rows))
    trainer.train()
    return [{k: v for k, v in line.items() if isinstance(v, float)} for line in trainer.state.log_history[:2]]

theirs = run(sys.argv[2] + "/theirs")
calls = []
apply = kernels_trl.FasttrainHead.apply
kernels_trl.FasttrainHead.apply = staticmethod(lambda *a: calls.append(1) or apply(*a))
kernels_trl.install()
print("RESULT" + json.dumps({"theirs": theirs, "ours": run(sys.argv[2] + "/ours"), "calls": len(calls)}))
"""

# A policy loss with an entropy bonus, as GRPO's, on TRL's head and on ours: gradients, or what the backward said.
TRL_ENTROPY = """
import sys
sys.path.insert(0, "examples")
import kernels_trl, torch
import trl.trainer.utils as utils
from transformers import LlamaConfig, LlamaForCausalLM

def gradients(coefficient):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=4))
    model.get_output_embeddings().weight.requires_grad_(False)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.randint(0, 64, (2, 9))
    out = model(input_ids=ids, labels=ids, fused_lm_head=True)
    loss = out.loss
    if coefficient:
        loss = loss - coefficient * (out.entropy * out.label_mask).sum() / out.label_mask.sum()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

def off(a, b):
    return ((a - b).norm() / b.norm()).item()

plain, bonus = gradients(0.0), gradients(0.5)
kernels_trl.install()
print("plain", off(gradients(0.0), plain) < 1e-5)
try:
    gradients(0.5)
except RuntimeError as error:
    print("raises", error)
kernels_trl.install(entropy_grad=True)
print("bonus", off(plain, bonus) > 1e-3, off(gradients(0.5), bonus) < 1e-5, off(gradients(0.0), plain) < 1e-5)
"""


def run(repository: Path, *command: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=repository, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_trls_dpo_trainer_has_the_same_losses_and_metrics_on_our_head(
    repository: Path, tiny_text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    out = run(repository, "-c", TRL_RUN, str(tiny_text), str(tmp_path))
    result = json.loads(out.partition("RESULT")[2])
    assert result["calls"] >= 4
    for theirs, ours in zip(result["theirs"], result["ours"], strict=True):
        for name in ("loss", "grad_norm", "entropy", "logps/chosen", "logits/rejected", "rewards/margins",
                     "mean_token_accuracy"):  # fmt: skip
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-5), name


@pytest.mark.slow
def test_the_trl_example_trains_from_the_command_line(
    repository: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    script = str(repository / "examples" / "kernels_trl.py")
    nothing = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert nothing.returncode == 2 and "usage: " in nothing.stderr
    row = {"prompt": "Say 1", "chosen": "1 it is, then", "rejected": "no"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run(tmp_path, script, str(tiny_text), "pairs.jsonl")
    assert (tmp_path / "trl-dpo").is_dir()


@pytest.mark.slow
def test_an_entropy_bonus_has_trls_gradient_or_raises_and_says_what_to_pass(repository: Path) -> None:
    pytest.importorskip("trl")
    plain, raises, bonus = run(repository, "-c", TRL_ENTROPY).splitlines()
    assert plain == "plain True"
    assert raises.startswith("raises ") and "install(entropy_grad=True)" in raises
    assert bonus == "bonus True True True"


def test_the_plain_hugging_face_loop_starts_at_ln_2_and_learns(repository: Path) -> None:
    lines = run(repository, "examples/kernels_hf_loop.py").splitlines()
    losses = [float(line.split()[1]) for line in lines if line.startswith("loss")]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] < 0.5


def test_hugging_face_kernels_load_the_package_under_a_name_of_its_own(
    repository: Path, tmp_path: Path
) -> None:
    pytest.importorskip("kernels")
    code = f"""
import sys; sys.path.insert(0, "examples")
import torch, kernels_hub, fasttrain_kernels
from pathlib import Path
from kernels import _rust
package = kernels_hub.load(kernels_hub.stage(Path({str(tmp_path)!r})))
assert package.__name__ != "fasttrain_kernels" and package.__all__ == fasttrain_kernels.__all__
variant = Path({str(tmp_path)!r}) / "build" / "torch-cpu"
metadata = _rust.Metadata.read_from_file(variant / "metadata.json")
(variant / "metadata.json").rename(variant.parent / "metadata.json")
metadata.digest.validate(_rust.Digest.hash_variant(metadata.digest.algorithm, variant))
hidden, weight = torch.randn(3, 16, requires_grad=True), torch.randn(100, 16)
ours = fasttrain_kernels.linear_logprob(hidden, weight, torch.tensor([1, 2, 99])).logprob
theirs = package.linear_logprob(hidden, weight, torch.tensor([1, 2, 99])).logprob
theirs.sum().backward()
print(torch.equal(ours, theirs), type(theirs.grad_fn).__module__ != type(ours.grad_fn).__module__)
"""
    assert run(repository, "-c", code).split()[0] == "True"
