"""A run's promises: step 0 at the reference, final/ loads elsewhere, options do what they say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fasttrain.errors import UserError

Runner = Callable[..., Any]


def plain_logps(model: Any, processor: Any, pairs: Path, answer: str) -> list[float]:
    """Sum of log-probs of every row's answer by transformers alone, one sequence at a time."""
    from PIL import Image

    tokenizer = getattr(processor, "tokenizer", processor)
    result = []
    for line in pairs.read_text().splitlines():
        row = json.loads(line)
        prompt = processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        full = processor.apply_chat_template([*row["prompt"], *row[answer]], tokenize=False)
        full = full[: full.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]
        images = [Image.open(pairs.parent / name).convert("RGB") for name in row.get("images") or []]
        options = {"add_special_tokens": False, "return_tensors": "pt"}
        if images:
            inputs = processor(images=images, text=full, **options)
            start = processor(images=images, text=prompt, **options)["input_ids"].shape[1]
        else:
            inputs = tokenizer(full, **options)
            start = tokenizer(prompt, **options)["input_ids"].shape[1]
        inputs.pop("token_type_ids", None)
        ids = inputs["input_ids"]
        with torch.no_grad():
            logp = model(**inputs).logits.log_softmax(-1)[0, start - 1 : -1]
        result.append(float(logp.gather(1, ids[0, start:, None]).sum()))
    return result


@pytest.mark.parametrize(
    "settings", [[], ["model.train_projector=true", "train.projector_learning_rate=5e-3"]]
)
def test_final_loads_in_peft_and_gives_the_log_probs_the_trainer_reports(
    tiny_llava: Path, vision: Path, run: Runner, tmp_path: Path, settings: list[str]
) -> None:
    """The last step runs at rate 0 (linear schedule's end), so its metrics are those of the saved adapter."""
    from peft import PeftModel
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    everything = ["train.pairs_per_step=1000", "train.learning_rate=2e-2"]
    run(tiny_llava, vision, *settings, *everything)
    # one more step reports the log-probs of the adapter after step 4, before step 5 changes it
    more = run(tiny_llava, vision, *settings, *everything, "train.max_steps=5", resume=True, output="run")
    run(tiny_llava, vision, *settings, *everything)
    base = LlavaForConditionalGeneration.from_pretrained(tiny_llava)
    processor = AutoProcessor.from_pretrained(tiny_llava)
    before = plain_logps(base, processor, vision, "chosen")
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "final").eval()
    for answer in ("chosen", "rejected"):
        values = plain_logps(adapted, processor, vision, answer)
        assert more.metrics[4][f"logps/{answer}"] == pytest.approx(sum(values) / len(values), rel=2e-6)
    assert (
        abs(sum(before) / len(before) - more.metrics[4]["logps/chosen"]) > 1e-2
    )  # the adapter does something


def test_the_pairs_that_moved_most_are_those_of_the_saved_adapter(
    tiny_llava: Path, vision: Path, run: Runner, tmp_path: Path
) -> None:
    """pair_changes.jsonl of step 5, made with the adapter that step 4 saved, against transformers and peft alone."""
    from peft import PeftModel
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from fasttrain.report import read_run
    from fasttrain.report.examples import PairReader

    settings = ["train.pairs_per_step=1000", "train.learning_rate=2e-2"]
    run(tiny_llava, vision, *settings)
    final = PeftModel.from_pretrained(
        LlavaForConditionalGeneration.from_pretrained(tiny_llava), tmp_path / "run" / "final"
    ).eval()
    processor = AutoProcessor.from_pretrained(tiny_llava)
    after = [plain_logps(final, processor, vision, answer) for answer in ("chosen", "rejected")]
    with final.disable_adapter():
        before = [plain_logps(final, processor, vision, answer) for answer in ("chosen", "rejected")]
    run(tiny_llava, vision, *settings, "train.max_steps=5", resume=True)
    lines = (tmp_path / "run" / "pair_changes.jsonl").read_text().splitlines()
    found = json.loads(lines[4])
    truth = [[row, a[0] - b[0], a[1] - b[1]] for row, (a, b) in enumerate(zip(zip(*after), zip(*before)))]
    truth.sort(key=lambda entry: entry[2] - entry[1])
    truth = truth[:4] + truth[-4:]
    assert found["step"] == 5 and len(lines) == 5
    reader = PairReader(read_run(tmp_path / "run"))
    rows = [reader.pair_of_prompt(row, place)[0].where for row, place, *_ in found["pairs"]]
    assert rows == [f"{vision} line {row + 1}" for row, *_ in truth]
    assert any(place for _, place, *_ in found["pairs"])  # prompts with several pairs are among them
    assert [v for _, _, *values in found["pairs"] for v in values] == pytest.approx(
        [v for _, *values in truth for v in values], abs=2e-3
    )


def test_full_fine_tuning_writes_a_model_that_from_pretrained_loads(
    tiny_text: Path, text: Path, run: Runner, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = ["lora=null", "train.learning_rate=1e-3", "train.pairs_per_step=1000"]
    run(tiny_text, text, *settings)
    more = run(tiny_text, text, *settings, "train.max_steps=5", resume=True)
    run(tiny_text, text, *settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert model.config.use_cache  # ours was off for training; whoever generates wants it on
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    values = plain_logps(model, tokenizer, text, "chosen")
    assert more.metrics[4]["logps/chosen"] == pytest.approx(sum(values) / len(values), rel=2e-6)
    assert more.metrics[4]["rewards/margins"] > 0.01


def test_init_from_starts_at_ln_2_with_that_adapter_as_reference(
    tiny_text: Path, text: Path, run: Runner, tiny_models: Any, tmp_path: Path
) -> None:
    adapter = tiny_models.build_adapter(tiny_text, tmp_path / "adapter", rank=3, b_std=0.1)
    base = run(tiny_text, text).metrics[0]
    start = [f"lora={{init_from: {adapter}}}"]
    first = run(tiny_text, text, *start).metrics[0]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert abs(first["logps/chosen"] - base["logps/chosen"]) > 0.1
    assert (
        run(tiny_text, text, *start, "lora.dropout=0.5").metrics[0]["loss"] != first["loss"]
    )  # dropout is the recipe's, and does not trip the check of step 0
    with pytest.raises(UserError, match=r"lora.rank: wanted the adapter's 3 \(or no value\), got 8"):
        run(tiny_text, text, *start, "lora.rank=8")


def test_first_step_stops_when_the_cache_belongs_to_something_else(
    tiny_text: Path, text: Path, run: Runner, fresh_cache: Path
) -> None:
    import sqlite3
    from hashlib import blake2b

    import numpy as np

    run(tiny_text, text)
    (file,) = (fresh_cache / "reference").glob("*.sqlite")
    with sqlite3.connect(file) as database:
        for key, value in database.execute("SELECT key, logp FROM logps").fetchall():
            wrong = (np.frombuffer(value, "<f4") + np.float32(0.01)).tobytes()
            checksum = blake2b(key + wrong, digest_size=8).digest()
            database.execute("UPDATE logps SET logp = ?, checksum = ? WHERE key = ?", (wrong, checksum, key))
    database.close()
    with pytest.raises(UserError, match=r"pairs.jsonl line \d+: before the first update the policy differs"):
        run(tiny_text, text)


def test_a_second_run_computes_no_reference_and_other_models_do(
    tiny_text: Path, text: Path, run: Runner, fresh_cache: Path, capfd: pytest.CaptureFixture[str], tiny_models: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    def computed(*settings: str, model: Path = tiny_text) -> int:
        run(model, text, *settings, "train.max_steps=1")
        err = capfd.readouterr().err
        return int(err.split(" computed now")[0].split()[-1])

    total = computed()
    assert total > 10
    assert computed() == 0
    assert computed("loss.kind=ipo", "train.seed=5", "lora.rank=2", "data.limit_pairs=7") == 0
    assert computed("model.dtype=bfloat16") == total
    assert computed(model=tiny_models.build_text(tmp_path / "other", seed=77)) == total
    template = tiny_models.build_text(
        tmp_path / "template", template=tiny_models.CHATML.replace("<|im_start|>", "<s>")
    )
    assert computed(model=template) == total  # same weights, another chat template
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        assert (computed(), computed()) == (total, 0)
    finally:
        matmul.fp32_precision = before
    assert computed() == 0


@pytest.mark.parametrize(
    "settings",
    [
        ["model.dtype=bfloat16"],
        ["model.quantize=nf4"],
        ["train.optimizer=adamw_8bit"],
        ["model.dtype=bfloat16", "lora=null"],
    ],
    ids=" ".join,
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_low_precision_runs_learn_and_resume(
    tiny_text: Path, text: Path, run: Runner, settings: list[str]
) -> None:
    settings = [*settings, "train.checkpoint_every=3", "train.max_steps=6", "train.pairs_per_step=1000"]
    calm = run(tiny_text, text, *settings).metrics
    assert calm[0]["loss"] == pytest.approx(0.6931, abs=0.05)
    assert calm[-1]["loss"] < calm[0]["loss"] - 0.01
    run(tiny_text, text, *settings[:-2], "train.max_steps=3", "train.pairs_per_step=1000", output="again")
    resumed = run(tiny_text, text, *settings, output="again", resume=True).metrics
    assert [line["loss"] for line in resumed] == [line["loss"] for line in calm]


def test_bf16_updates_below_its_resolution_are_not_lost(tiny_text: Path, text: Path, run: Runner) -> None:
    """A weight of 1 in bf16 does not move by 1e-4 at a time; its fp32 master does."""
    settings = ["model.dtype=bfloat16", "lora=null", "train.learning_rate=1e-4", "train.max_steps=40"]
    result = run(tiny_text, text, *settings, "train.pairs_per_step=1000")
    norm = "model.norm.weight"
    from safetensors.torch import load_file

    before = load_file(next(tiny_text.glob("*.safetensors")))[norm].to(torch.bfloat16)
    after = load_file(next((result.folder / "final").glob("*.safetensors")))[norm]
    assert after.dtype == torch.bfloat16
    assert (before != after).float().mean() > 0.1


def test_sliding_windows_share_prompts_and_give_the_losses_of_ordinary_sequences(
    tiny_mistral_sliding: Path, text: Path, run: Runner, capfd: pytest.CaptureFixture[str]
) -> None:
    shared = run(tiny_mistral_sliding, text).metrics
    assert "warning" not in capfd.readouterr().err
    truth = run(tiny_mistral_sliding, text, "train.share_prefix=false").metrics
    assert shared[0]["tokens"] < truth[0]["tokens"]
    for a, b in zip(shared, truth):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_evaluation_of_the_training_pairs_is_the_loss_of_the_next_step(
    tiny_text: Path, text: Path, run: Runner
) -> None:
    settings = [
        f"data.eval={text}",
        "train.pairs_per_step=1000",
        "train.eval_every=1",
        "train.tokens_per_pack=100",
    ]
    lines = run(tiny_text, text, *settings).metrics
    for now, after in itertools.pairwise(lines):
        for name in ("loss", "rewards/margins", "logps/rejected"):
            assert now[f"eval_{name}"] == pytest.approx(after[name], rel=1e-5, abs=1e-6)


def test_resume_with_another_recipe_is_refused_and_listed(tiny_text: Path, text: Path, run: Runner) -> None:
    run(tiny_text, text)
    with pytest.raises(
        UserError, match=r"loss.beta was 0.1, is 0.2; train.learning_rate was 0.005, is 0.001"
    ):
        run(tiny_text, text, "loss.beta=0.2", "train.learning_rate=1e-3", "train.max_steps=9", resume=True)


def test_a_run_that_ran_out_of_memory_goes_on_in_smaller_packs(
    tiny_text: Path, text: Path, run: Runner
) -> None:
    wanted = run(tiny_text, text, "train.max_steps=3", "train.schedule=constant").metrics
    first = run(tiny_text, text, "train.max_steps=2", "train.schedule=constant", output="again")
    smaller = "train.tokens_per_pack=150", "train.gradient_checkpointing=true"
    more = ("train.max_steps=3", "train.schedule=constant", *smaller)
    found = run(tiny_text, text, *more, resume=True, output="again").metrics
    assert found[2]["loss"] == pytest.approx(wanted[2]["loss"], rel=1e-5) and len(found) == 3
    facts = json.loads((first.folder / "environment.json").read_text())
    assert (facts["tokens_per_pack"], facts["gradient_checkpointing"]) == (150, True)


def test_a_run_of_a_version_with_fewer_settings_goes_on(tiny_text: Path, text: Path, run: Runner) -> None:
    folder = run(tiny_text, text, "train.max_steps=2").folder
    recipe = yaml.safe_load((folder / "config.yaml").read_text())
    del recipe["loss"]["f_alpha"]
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    assert len(run(tiny_text, text, "train.max_steps=3", resume=True).metrics) == 3
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(
        UserError, match=r"loss.f_alpha was 0.5, is 0.3; loss.f_divergence was 'reverse_kl', is"
    ):
        run(tiny_text, text, "loss.f_divergence=alpha_divergence", "loss.f_alpha=0.3", resume=True)


def test_resuming_a_finished_run_says_that_nothing_is_left(
    tiny_text: Path, text: Path, run: Runner, capfd: pytest.CaptureFixture[str]
) -> None:
    before = run(tiny_text, text, "train.max_steps=3").metrics
    capfd.readouterr()
    after = run(tiny_text, text, "train.max_steps=2", resume=True)
    said = capfd.readouterr().err
    assert "nothing to train: the run stands at step 3 of 2" in said and "training:" not in said
    assert after.metrics == before


def test_old_checkpoints_go_and_the_newest_stay(tiny_text: Path, text: Path, run: Runner) -> None:
    result = run(tiny_text, text, "train.checkpoint_every=1", "train.keep_checkpoints=2", "train.max_steps=5")
    assert sorted(p.name for p in (result.folder / "checkpoints").iterdir()) == ["step-000004", "step-000005"]


def test_a_checkpoint_that_a_kill_kept_from_being_deleted_goes_on_resume(
    tiny_text: Path, text: Path, run: Runner
) -> None:
    settings = "train.checkpoint_every=1", "train.max_steps=2"
    checkpoints = run(tiny_text, text, *settings, "train.keep_checkpoints=2").folder / "checkpoints"
    run(tiny_text, text, *settings, "train.keep_checkpoints=1", resume=True)
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]


def test_a_damaged_file_of_the_run_folder_is_named_on_resume(
    tiny_text: Path, text: Path, run: Runner
) -> None:
    folder = run(tiny_text, text, "train.max_steps=1").folder
    for name, held, said in (
        ("config.yaml", "a: [b", "not valid YAML: line 1"),
        ("config.yaml", "- a", "wanted a mapping of sections, got list"),
        ("config.yaml", "", "is empty: it held the recipe that the run began with"),
        ("environment.json", "{", "Expecting property name"),
        ("environment.json", "[]", "wanted a JSON object, got list"),
        ("environment.json", '{"began": "today"}', "began: wanted a date, got 'today'"),
    ):
        sound = (folder / name).read_text()
        (folder / name).write_text(held)
        with pytest.raises(UserError) as refused:
            run(tiny_text, text, "train.max_steps=2", resume=True)
        assert str(folder / name) in str(refused.value) and said in str(refused.value)
        assert len(str(refused.value).splitlines()) == 1
        (folder / name).write_text(sound)


def test_a_revision_of_a_model_folder_is_refused(tiny_text: Path, text: Path, run: Runner) -> None:
    with pytest.raises(UserError, match=r"^model.revision: wanted null with the folder .*, got 'v2'"):
        run(tiny_text, text, "model.revision=v2")


def test_missing_weights_are_an_error_not_random_numbers(
    tiny_text: Path, text: Path, run: Runner, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_text, broken)
    file = next(broken.glob("*.safetensors"))
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"wanted every weight in .*, got none for model.layers.1.mlp.up_proj.weight"
    ):
        run(broken, text)


def test_a_mistake_in_the_data_leaves_no_run_folder(
    tiny_text: Path, text: Path, run: Runner, tmp_path: Path
) -> None:
    good = text.read_text()
    text.write_text(good + "nope\n")
    with pytest.raises(UserError, match="line 19: row: wanted a JSON object"):
        run(tiny_text, text)
    assert not (tmp_path / "run").exists()


def test_truncated_weights_are_named(tiny_text: Path, text: Path, run: Runner, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_text, broken)
    file = next(broken.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model.name: cannot load .*broken"):
        run(broken, text)


def test_groups_that_do_not_fit_a_pack_are_told_once(
    tiny_text: Path, text: Path, run: Runner, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tiny_text, text, "train.tokens_per_pack=40")
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "exceed train.tokens_per_pack = 40" in warnings[0]


def test_a_gpu_that_is_passed_over_is_told(
    tiny_text: Path, text: Path, run: Runner, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    run(tiny_text, text)
    assert "note: Apple's GPU is not used" in capfd.readouterr().err


@pytest.mark.parametrize("config", ["recipe.yaml", {"model": {"name": "m"}}, None])
def test_what_is_no_recipe_is_a_users_mistake(config: Any) -> None:
    from fasttrain import train_dpo, train_sft

    for train in (train_dpo, train_sft):
        with pytest.raises(UserError, match=r"^config: wanted a DPOConfig, which load_config\(path\) reads"):
            train(config)


def test_a_first_step_without_a_gradient_is_told(
    tiny_llava: Path, text: Path, run: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "warning: nothing that trains has a gradient in the first step"
    run(tiny_llava, text, "lora.targets=[linear_1]")  # the projector, through which text does not run
    assert told in capsys.readouterr().err
    run(tiny_llava, text)
    assert told not in capsys.readouterr().err
