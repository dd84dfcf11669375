"""Models whose Python code is their own answer, are evaluated and merged where the user allows it, and nowhere else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fasttrain.answering.local import LocalModel
from fasttrain.config import ModelConfig
from fasttrain.errors import UserError

# in one file: transformers would keep the package of two, by the folder's name, from one test to the next
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()


class MyConfig(LlamaConfig):
    model_type = "my_llama"


class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once the model's code has run."""
    return tmp_path / "it_ran"


@pytest.fixture
def own_code(tiny_text: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiny_text, weight for weight, as a model of an unknown type whose code lies in its folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = tmp_path / "own"
    shutil.copytree(tiny_text, folder)
    (folder / "modeling_my.py").write_text(CODE.format(mark=str(mark)))
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": "my_llama", "architectures": ["MyModel"]}
    about["auto_map"] = {"AutoConfig": "modeling_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyModel"}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def adapter(tiny_text: Path, tmp_path: Path) -> Path:
    """An adapter on tiny_text in a run's final/, whose recipe, not ours, would let code run."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(tiny_text)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    final = tmp_path / "run" / "final"
    get_peft_model(base, config).save_pretrained(final)
    for folder in (final, final.parent):
        (folder / "config.yaml").write_text("model: {name: m, trust_remote_code: true}\ndata: {train: x}\n")
    return final


def refusal(run_command: Callable[..., int], capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert run_command(*words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def texts(tiny_models: ModuleType, path: Path) -> list[str]:
    return [turn for row in tiny_models.read_rows(path) for turn in row["choices"][0]["turns"]]


def test_own_code_answers_with_the_flag_and_is_refused_without_it(
    own_code: Path, tiny_text: Path, adapter: Path, mark: Path, text_questions: Path, tmp_path: Path,
    run_command: Callable[..., int], capsys: pytest.CaptureFixture[str], tiny_models: ModuleType,
) -> None:  # fmt: skip
    out = tmp_path / "mine.jsonl"
    words = ("answer", "-m", own_code, text_questions, "-o", out, "--max-new-tokens", 5)
    wanted = (
        f"--model: wanted a model without Python code of its own, or --trust-remote-code, got {own_code}\n"
    )
    assert refusal(run_command, capsys, *words).endswith(wanted)
    # nor does the recipe in an adapter's folder allow it
    for place in (adapter, adapter.parent):
        assert refusal(run_command, capsys, *words, "-a", place).endswith(wanted)
    assert not mark.exists() and not out.exists()
    for extra in ((), ("-a", adapter)):
        truth = tmp_path / "truth.jsonl"
        plain = ("answer", "-m", tiny_text, text_questions, "-o", truth, "--max-new-tokens", 5, *extra)
        assert run_command(*plain) == 0
        assert run_command(*words, "--trust-remote-code", *extra) == 0
        assert mark.exists()
        assert texts(tiny_models, out) == texts(tiny_models, truth)


def test_memory_is_planned_of_own_code_with_the_setting_and_refused_without_it(
    own_code: Path,
    mark: Path,
    tmp_path: Path,
    run_command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{name: {own_code}}}\ndata: {{train: none.jsonl}}\n")
    words = ("plan", "-c", recipe, "--lengths", "600,50,30")
    told = refusal(run_command, capsys, *words)
    assert told.endswith(f"without Python code of its own, or model.trust_remote_code, got {own_code}\n")
    assert not mark.exists()
    assert run_command(*words, "-s", "model.trust_remote_code=true") == 0
    assert mark.exists()


def test_own_code_is_evaluated_with_the_flag_and_refused_without_it(
    own_code: Path, tiny_text: Path, mark: Path, tmp_path: Path, run_command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = [{"instruction": "say red", "output": "", "generator": "g", "dataset": "d"}]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(rows))
    options = ("--data", tmp_path, "--max-new-tokens", 5, "--model-id", "m")
    words = ("eval", "alpaca-eval", "-m", own_code, "-o", tmp_path / "mine", *options)
    assert "or --trust-remote-code, got" in refusal(run_command, capsys, *words)
    assert not mark.exists()
    assert run_command(*words, "--trust-remote-code") == 0
    assert run_command("eval", "alpaca-eval", "-m", tiny_text, "-o", tmp_path / "truth", *options) == 0
    said = [(tmp_path / name / "model_outputs.json").read_text() for name in ("mine", "truth")]
    assert said[0] == said[1]


def test_an_adapter_on_own_code_is_merged_with_the_flag_and_refused_without_it(
    own_code: Path, adapter: Path, mark: Path, tmp_path: Path, run_command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from safetensors.torch import load_file

    assert run_command("merge", adapter, "-o", tmp_path / "truth") == 0
    about = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(about | {"base_model_name_or_path": str(own_code)})
    )
    merged = tmp_path / "merged"
    words = ("merge", adapter, "-o", merged)
    assert "or --trust-remote-code, got" in refusal(run_command, capsys, *words)
    assert not mark.exists() and not merged.exists()
    assert run_command(*words, "--trust-remote-code") == 0
    found, truth = (load_file(folder / "model.safetensors") for folder in (merged, tmp_path / "truth"))
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], truth[name]) for name in truth)
    assert (merged / "modeling_my.py").read_text() == (own_code / "modeling_my.py").read_text()


def test_the_flag_is_refused_with_a_server(
    text_questions: Path, tmp_path: Path, run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "answer",
        "-m",
        "x",
        "--server",
        "http://localhost:9",
        text_questions,
        "-o",
        tmp_path / "a.jsonl",
    )
    told = refusal(run_command, capsys, *words, "--trust-remote-code")
    assert "--trust-remote-code: wanted with a model in this process" in told


def test_answers_of_changed_code_are_not_taken_for_those_of_the_old(own_code: Path) -> None:
    config = ModelConfig(name=str(own_code), trust_remote_code=True)
    before = LocalModel(config).version
    assert LocalModel(config).version == before
    with (own_code / "modeling_my.py").open("a") as file:
        file.write("# changed\n")
    assert LocalModel(config).version != before


def test_own_code_with_eager_attention_only_gives_the_losses_of_transformers_own(
    own_code: Path, tiny_text: Path, text_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    code = own_code / "modeling_my.py"
    code.write_text(code.read_text() + "    _supports_sdpa = False\n")  # PreTrainedModel's default
    pairs = text_pairs(tmp_path / "pairs.jsonl", 8)

    def losses(model: Path) -> list[float]:
        raw = {
            "model": {"name": model, "trust_remote_code": True},
            "lora": {"rank": 4, "alpha": 8, "targets": ["q_proj"]},
            "data": {"train": pairs, "workers": 0},
            "train": {"output": tmp_path / "run", "max_steps": 3, "learning_rate": 1e-2, "warmup_ratio": 0.0},
            "track": [],
        }
        return [line["loss"] for line in train_dpo(config_from_dict(raw), overwrite=True).metrics]

    assert losses(own_code) == pytest.approx(losses(tiny_text), abs=1e-4)


def test_own_code_under_a_known_models_type_is_checked_before_it_shares_prompts(
    own_code: Path, text_pairs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    code = own_code / "modeling_my.py"
    looks_back = """
from transformers import LlamaModel


class MyDecoder(LlamaModel):
    def forward(self, input_ids=None, **given):
        out = super().forward(input_ids, **given)
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.cumsum(1)
        return out


class MyModel(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = MyDecoder(config)
"""
    code.write_text(code.read_text().split("class MyConfig")[0] + looks_back)
    about = json.loads((own_code / "config.json").read_text())
    about |= {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "modeling_my.MyModel"}}
    (own_code / "config.json").write_text(json.dumps(about))
    raw = {
        "model": {"name": own_code, "trust_remote_code": True},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": text_pairs(tmp_path / "pairs.jsonl", 8), "workers": 0},
        "train": {"output": tmp_path / "run", "max_steps": 1},
        "track": [],
    }
    train_dpo(config_from_dict(raw))
    assert "sharing prefixes changes the log-probs of MyModel" in capsys.readouterr().err


def test_references_of_changed_code_are_computed_again_and_a_run_does_not_go_on_with_it(
    own_code: Path, text_pairs: Callable[..., Path], tmp_path: Path, fresh_cache: Path
) -> None:
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    def train(steps: int, **how: bool) -> str:
        raw = {
            "model": {"name": str(own_code), "trust_remote_code": True},
            "lora": {"rank": 4, "alpha": 8, "targets": ["q_proj"]},
            "data": {"train": str(pairs), "workers": 0},
            "train": {"output": str(tmp_path / "run"), "max_steps": steps, "checkpoint_every": 1},
            "track": [],
        }  # fmt: skip
        folder = train_dpo(config_from_dict(raw), **how).folder
        return str(json.loads((folder / "environment.json").read_text())["reference_cache"])

    pairs = text_pairs(tmp_path / "pairs.jsonl", 6)
    before = train(1)
    assert train(2, resume=True) == before
    with (own_code / "modeling_my.py").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(UserError, match=r"the Python code in the folder of model\.name"):
        train(3, resume=True)
    assert train(1, overwrite=True) != before
