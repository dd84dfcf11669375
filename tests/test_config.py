"""The recipe: every published key with its default and type, and one clear line for every way to get it wrong."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fasttrain.config import (
    DataConfig,
    DistributedConfig,
    DPOConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    ReferenceConfig,
    TrainConfig,
    config_from_dict,
    load_config,
)
from fasttrain.errors import UserError
from fasttrain.other_trainers import NONE_OF_OURS, OURS

# The published recipe, key for key; what it leaves to the user has its own value in MINE.
PUBLISHED = """
model:
  name: <mine>
  revision: null
  dtype: auto
  attention: auto
  quantize: null
  train_projector: false
lora:
  rank: 128
  alpha: 256
  dropout: 0.0
  targets: auto
  init_from: null
data:
  train: <mine>
  eval: null
  image_root: null
  max_length: 3000
  overflow: error
  on_bad_row: stop
  limit_pairs: null
  workers: auto
loss:
  kind: sigmoid
  weights: null
  beta: 0.1
  label_smoothing: 0.0
  f_divergence: reverse_kl
  ld_alpha: null
  use_weighting: false
train:
  output: <mine>
  epochs: 3
  max_steps: null
  pairs_per_step: 128
  tokens_per_pack: auto
  share_prefix: true
  shuffle: true
  learning_rate: 5.0e-5
  projector_learning_rate: 2.0e-5
  schedule: cosine
  warmup_ratio: 0.03
  weight_decay: 0.0
  grad_clip: 1.0
  optimizer: adamw
  gradient_checkpointing: auto
  compile: false
  seed: 0
  log_every: 1
  eval_every: null
  checkpoint_every: 50
  keep_checkpoints: 2
reference:
  cache: auto
distributed:
  zero_stage: null
  deepspeed_config: null
track: [tensorboard]
"""
MINE = {"model": {"name": "m"}, "data": {"train": "p.jsonl"}}
ADDED = {
    "data.eval_prompt_suffix",
    "data.eval_questions",
    "loss.discopop_tau",
    "loss.f_alpha",
    "loss.router_aux_weight",
    "loss.simpo_gamma",
    "model.bos",
    "model.trust_remote_code",
    "train.betas",
    "train.eps",
    "train.min_rate",
    "train.warmup_steps",
    "data.group_by",
}  # beyond the published keys


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys of a recipe."""
    return {
        f"{section}.{key}" if isinstance(values, dict) else section: value
        for section, values in tree.items()
        for key, value in (values if isinstance(values, dict) else {"": values}).items()
    }


def recipe(text: str, folder: Path, *overrides: str) -> DPOConfig:
    path = folder / "recipe.yaml"
    path.write_text("model: {name: m}\ndata: {train: p.jsonl}\n" + text, encoding="utf-8")
    return load_config(path, overrides)


def mistake(text: str, folder: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        recipe(text, folder, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_published_key_exists_with_its_default() -> None:
    published = flat(yaml.safe_load(PUBLISHED))
    ours = flat(config_from_dict(MINE).to_dict())
    assert set(ours) - set(published) == ADDED
    assert {key: ours[key] for key, value in published.items() if value != "<mine>"} == {
        key: value for key, value in published.items() if value != "<mine>"
    }


@pytest.mark.parametrize("key", sorted(set(flat(yaml.safe_load(PUBLISHED)))))
def test_a_value_of_a_wrong_type_is_refused_by_name(key: str, tmp_path: Path) -> None:
    assert f"{key}: wanted " in mistake("", tmp_path, f"{key}={{a: {{b: 1}}}}")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=1e-6", 1e-6),
        ("train.learning_rate=5", 5.0),
        ("train.pairs_per_step=1e2", 100),
        ("train.epochs=0.5", 0.5),
        ("train.tokens_per_pack=4096", 4096),
        ("train.grad_clip=null", None),
        ("train.checkpoint_every=null", None),
        ("train.gradient_checkpointing=false", False),
        ("lora.rank=8", 8),
        ("lora.targets=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("loss.kind=[sigmoid, ipo]", ["sigmoid", "ipo"]),
        ("data.eval=[a.jsonl, b.parquet]", ["a.jsonl", "b.parquet"]),
        ("data.workers=0", 0),
        ("model.revision='1234'", "1234"),
        ("train.output=a=b", "a=b"),
        ("track=[]", []),
    ],
)
def test_an_override_is_read_as_yaml_and_typed(override: str, value: Any, tmp_path: Path) -> None:
    read = flat(recipe("", tmp_path, override).to_dict())[override.partition("=")[0]]
    assert read == value and type(read) is type(value)


def test_overrides_that_are_no_list_are_refused_as_a_whole() -> None:
    """One in its string was refused by its first letter."""
    with pytest.raises(UserError, match=r"^overrides: wanted a list of key=value, got 'train.seed=3'$"):
        config_from_dict({}, "train.seed=3")


def test_the_last_override_wins_and_the_recipe_gives_way(tmp_path: Path) -> None:
    config = recipe("train: {seed: 1}\n", tmp_path, "train.seed=2", "train.seed=3", "train.epochs=1")
    assert (config.train.seed, config.train.epochs) == (3, 1)


def test_lora_null_is_full_fine_tuning_and_a_lora_key_brings_it_back(tmp_path: Path) -> None:
    assert recipe("", tmp_path, "lora=null").lora is None
    assert recipe("lora: null\n", tmp_path).lora is None
    back = recipe("lora: null\n", tmp_path, "lora.rank=8").lora
    assert back is not None and (back.rank, back.alpha, back.targets) == (8, 256, "auto")


def test_init_from_leaves_rank_alpha_and_targets_to_the_adapter(tmp_path: Path) -> None:
    lora = recipe("", tmp_path, "lora.init_from=runs/a/final").lora
    assert lora is not None and (lora.rank, lora.alpha, lora.targets) == (None, None, None)


def test_an_empty_section_means_its_defaults(tmp_path: Path) -> None:
    assert recipe("loss:\ntrain: {}\n", tmp_path) == config_from_dict(MINE)


def test_a_written_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    config = recipe("lora: null\n", tmp_path, "train.learning_rate=1e-6", "data.eval=[é.jsonl]")
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config


def test_yaml_merge_keys_work(tmp_path: Path) -> None:
    config = recipe("train: {<<: {seed: 3, epochs: 1}, seed: 4}\n", tmp_path)
    assert (config.train.seed, config.train.epochs) == (4, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {learning_rat: 1}\n", "unknown key train.learning_rat; did you mean 'learning_rate'?"),
        ("los: {beta: 1}\n", "unknown key los; did you mean 'loss'?"),
        ("learning_rate: 1\n", "unknown key learning_rate; did you mean 'train.learning_rate'?"),
        ("beta: 1\n", "unknown key beta; did you mean 'loss.beta'?"),  # not 'data', which looks alike
        ("rank: 1\n", "unknown key rank; did you mean 'lora.rank'?"),  # not 'train'
        ("train: {beta: 1}\n", "unknown key train.beta; did you mean 'loss.beta'?"),
        ("1: 2\n", "unknown key 1"),
        ("what: dpo\n", "; wanted one of model, lora, data, loss, train, reference, distributed, track"),
        ("stage: dpo\n", "unknown key stage: the command says it: fasttrain dpo or fasttrain sft"),
        ("distributed: {stage: 3}\n", "did you mean 'zero_stage'?"),
        ("lora: {use_rslora: true}\n", "unknown key lora.use_rslora: set lora.alpha to the square root of"),
        ("train: {lr_scheduler_kwargs: {min_lr_rate: 0.1}}\n", "did you mean 'train.min_rate'?"),
        ("train: {adam_beta2: 0.95}\n", "did you mean 'train.betas'?"),
        ("model_name_or_path: x\n", "unknown key model_name_or_path; did you mean 'model.name'?"),
        ("pretrain: x\n", "unknown key pretrain; did you mean 'model.name'?"),  # OpenRLHF's, not 'train'
        ("loss_type: ipo\n", "unknown key loss_type; did you mean 'loss.kind'?"),  # not 'loss'
        ("loss: {f_alpha_divergence_coef: 1}\n", "did you mean 'loss.f_alpha'?"),  # not 'f_divergence'
        ("loss: {cpo_alpha: 1}\n", "did you mean 'loss.weights'?"),  # not 'f_alpha'
        ("lora: {target_parameters: [experts.down_proj]}\n", "did you mean 'lora.targets'?"),
        ("train: {assistant_only_loss: true}\n", "sft learns the answers of the assistant, and no question"),
        ("lora: {r: 16}\n", "unknown key lora.r; did you mean 'lora.rank'?"),
        (
            "train: {save_steps: 9}\n",
            "unknown key train.save_steps; did you mean 'train.checkpoint_every'?",
        ),  # not 'max_steps'
        ("train: {template: llava}\n", "unknown key train.template: prompts are written by"),  # not 'compile'
        ("train: {resume_from_checkpoint: true}\n", "did you mean the option '--resume'?"),
        (
            "train: {data: {train: x}}\n",
            "unknown key train.data; 'data' stands at the top of the recipe, not in 'train'",
        ),
        ("loss: {kind: sigmod}\n", "got 'sigmod'; did you mean 'sigmoid'?"),
    ],
)
def test_an_unknown_word_is_answered_with_the_closest_known_one(text: str, said: str, tmp_path: Path) -> None:
    assert said in mistake(text, tmp_path)


def test_names_of_other_trainers_stand_for_settings_that_exist() -> None:
    keys = set(flat(config_from_dict(MINE).to_dict())) | {
        "lora",
        "track",
        "--resume",
        "--overwrite",
    }
    assert set(OURS.values()) <= keys
    assert not (set(OURS) | set(NONE_OF_OURS)) & {key.rpartition(".")[2] for key in keys}
    assert not set(OURS) & set(NONE_OF_OURS)


def test_settings_of_trl_have_an_answer() -> None:
    """Those that decide what is trained; what steers TRL's own machinery is not counted."""
    import transformers

    trl = pytest.importorskip("trl")
    known = (
        set(OURS)
        | set(NONE_OF_OURS)
        | {key.rpartition(".")[2] for key in flat(config_from_dict(MINE).to_dict())}
    )
    own = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    own -= {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert own - known == {"model_init_kwargs"}


def test_the_quickstart_page_translates_names_of_other_trainers_as_errors_do() -> None:
    page = (Path(__file__).parent.parent / "docs/quickstart.md").read_text(encoding="utf-8")
    found = set()
    for theirs, ours in re.findall(r"^\| (.*`.*) \| (.*) \|$", page, re.MULTILINE):
        for name in re.findall(r"`(\w+)", theirs):
            if name in OURS:
                found.add(name)
                assert OURS[name].rpartition(".")[2] in ours, name
    assert {"f_alpha_divergence_coef", "deepspeed", "freeze_multi_modal_projector"} <= found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {pairs_per_step: 1.5}\n", "train.pairs_per_step: wanted an integer, got 1.5"),
        ("train: {pairs_per_step: true}\n", "train.pairs_per_step: wanted an integer, got True"),
        ("train: {pairs_per_step: 0}\n", "train.pairs_per_step: wanted an integer of at least 1, got 0"),
        ("train: {tokens_per_pack: fast}\n", "train.tokens_per_pack: wanted an integer or auto, got 'fast'"),
        ("train: {share_prefix: 'false'}\n", "train.share_prefix: wanted true or false, got 'false'"),
        ("train: {share_prefix: 0}\n", "train.share_prefix: wanted true or false, got 0"),
        ("train: {gradient_checkpointing: 'yes'}\n", "train.gradient_checkpointing: wanted true or false or"),
        ("train: {epochs: .inf}\n", "train.epochs: wanted a number, got inf"),
        ("train: {epochs: 0}\n", "train.epochs: wanted a positive number, got 0"),
        (
            "train: {epochs: 1.0e+300}\n",
            "train.epochs: wanted at most 100,000 where train.max_steps is null, got 1e+300",
        ),
        (
            "train: {tokens_per_pack: 1.0e+12}\n",
            "train.tokens_per_pack: wanted auto or 1 to below 2^31, got 1000000000000",
        ),
        ("train: {seed: -1}\n", "train.seed: wanted"),
        ("lora: {targets: all}\n", "lora.targets: wanted auto for every linear of the language model"),
        ("lora: {targets: 'q_proj, v_proj'}\n", "or a list of names, got 'q_proj, v_proj'"),
        ("train: {warmup_ratio: 1.1}\n", "train.warmup_ratio: wanted 0 to 1"),
        (
            "train: {warmup_ratio: 0.1, warmup_steps: 5}\n",
            "train.warmup_steps: wanted null with train.warmup_ratio 0.1",
        ),
        (
            "train: {schedule: constant, min_rate: 0.1}\n",
            "train.min_rate: wanted 0 with train.schedule constant",
        ),
        ("train: {betas: [0.9]}\n", "train.betas: wanted two numbers from 0 to below 1, got [0.9]"),
        (
            "train: {grad_clip: 0}\n",
            "train.grad_clip: wanted a positive number, or null for no clipping, got 0",
        ),
        ("loss: {beta: .nan}\n", "loss.beta: wanted a number, got nan"),
        ("loss: {beta: 0}\n", "loss.beta: wanted a positive number, got 0"),
        ("loss: {label_smoothing: 0.5}\n", "loss.label_smoothing: wanted 0 to below 0.5, got 0.5"),
        ("loss: {kind: []}\n", "loss.kind: wanted a loss"),
        ("loss: {kind: [sigmoid, ipo], weights: [1]}\n", "loss.weights: wanted 2 number(s)"),
        ("loss: {ld_alpha: 2}\n", "loss.ld_alpha: wanted 0 to 1"),
        ("loss: 5\n", "loss: wanted a section with keys, got 5"),
        ("model: {name: ''}\n", "model"),
        ("lora: {rank: 0}\n", "lora.rank: wanted"),
        ("lora: {dropout: 1}\n", "lora.dropout: wanted"),
        ("lora: {targets: '['}\n", "lora.targets: wanted auto, names or a regular expression, got '['"),
        ("lora: {targets: []}\n", "lora.targets: wanted auto, names or a regular expression, got []"),
        ("lora: {targets: ''}\n", "lora.targets: wanted auto, names or a regular expression, got ''"),
        (
            "lora: {targets: [q_proj, '']}\n",
            "lora.targets: wanted auto, names or a regular expression, got ['q_proj', '']",
        ),
        ("track: [tensorbord]\n", "track: wanted any of tensorboard"),
        ("track: wandb\n", "track: wanted a list of text, got 'wandb'; did you mean [wandb]?"),
        ("track: none\n", "track: wanted a list of text, got 'none'; [] for none"),
        ("track: null\n", "track: wanted a list of text, got None; [] for none"),
        ("lora: false\n", "lora: wanted a section with keys, or null, got False"),
        ("loss: {kind: dpo}\n", "got 'dpo'; DPO's own is sigmoid"),  # not ipo
        ("loss: {kind: kto_pair}\n", "got 'kto_pair'; there is no KTO here"),  # not exo_pair
        ("distributed: {zero_stage: 1}\n", "distributed.zero_stage: wanted null, 2 or 3, got 1"),
        ("lora: null\nreference: {cache: ''}\n", "reference.cache: wanted auto or a folder"),
        ("train: {seed: 1" + 400 * "0" + "}\n", "train.seed: wanted an integer"),
        ("train: {output: 2026-11-23}\n", "train.output: wanted text, got 2026-11-23; put it in quotes"),
        ("train: {output: 12}\n", "train.output: wanted text, got 12; put it in quotes"),
        ("lora: {init_from: no}\n", "lora.init_from: wanted text or null, got False; put it in quotes"),
        (
            "train: {seed: 0x" + 5000 * "f" + "}\n",
            "train.seed: wanted an integer, got an integer of 20000 bits",
        ),
        (r'train: {output: "C:\0runs"}', r"train.output: wanted text, got 'C:\x00runs'"),
        (r'reference: {cache: "a\ud800b"}', r"reference.cache: wanted text, got 'a\ud800b'"),
    ],
)
def test_a_wrong_value_names_key_wanted_and_got(text: str, said: str, tmp_path: Path) -> None:
    assert said in mistake(text, tmp_path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": [""]}, "data.train: wanted paths, none of them empty, got ['']"),
        ({"train": "a", "eval": ["b", ""]}, "data.eval: wanted paths, none of them empty, got ['b', '']"),
        ({"train": "a", "eval": ""}, "data.eval: wanted a path, several, or null, got ''"),
    ],
)
def test_an_empty_path_is_no_working_folder(data: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        config_from_dict({"model": {"name": "m"}, "data": data})


def test_model_and_pairs_must_be_given() -> None:
    with pytest.raises(UserError, match=r"^model\.name: wanted a hub id or a folder"):
        config_from_dict({"data": {"train": "p.jsonl"}})
    with pytest.raises(UserError, match=r"^data\.train: wanted a pair file"):
        config_from_dict({"model": {"name": "m"}})
    with pytest.raises(UserError, match=r"^data\.train: wanted a pair file"):
        config_from_dict({"model": {"name": "m"}, "data": {"train": []}})


def test_path_objects_are_the_texts_they_stand_for(tmp_path: Path) -> None:
    paths: dict[str, dict[str, Any]] = {
        "model": {"name": tmp_path / "model"},
        "lora": {"init_from": tmp_path / "run" / "final"},
        "data": {
            "train": [tmp_path / "a.jsonl", "b.jsonl"],
            "eval": tmp_path / "eval.jsonl",
            "image_root": tmp_path / "é",
        },
        "train": {"output": tmp_path / "out"},
        "reference": {"cache": tmp_path / "cache"},
        "distributed": {"zero_stage": 2, "deepspeed_config": tmp_path / "ds.json"},
    }

    def text(value: Any) -> Any:
        return [text(entry) for entry in value] if isinstance(value, list) else value and str(value)

    texts = {
        name: {key: value if key == "zero_stage" else text(value) for key, value in section.items()}
        for name, section in paths.items()
    }
    built = DPOConfig(
        model=ModelConfig(**paths["model"]),
        lora=LoraConfig(**paths["lora"]),
        data=DataConfig(**paths["data"]),
        train=TrainConfig(**paths["train"]),
        reference=ReferenceConfig(**paths["reference"]),
        distributed=DistributedConfig(**paths["distributed"]),
    )
    expected = config_from_dict(texts)
    assert built == config_from_dict(paths) == expected
    assert yaml.safe_load(built.to_yaml()) == expected.to_dict()
    assert paths["data"]["train"][0] == tmp_path / "a.jsonl"  # the caller's own list stays as it was


def test_a_path_object_where_no_text_is_wanted_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"^train\.seed: wanted an integer, got PosixPath"):
        config_from_dict(MINE | {"train": {"seed": Path("1")}})
    with pytest.raises(UserError, match=r"^model\.dtype: wanted auto or float32"):
        config_from_dict(MINE | {"model": {"name": "m", "dtype": Path("auto")}})
    with pytest.raises(
        UserError, match=r"^loss\.kind: wanted one of .* got 'sigmod'; did you mean 'sigmoid'"
    ):
        LossConfig(kind=Path("sigmod"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (TrainConfig, "schedule", "cosine_with_restarts"),  # would have been cosine
        (TrainConfig, "share_prefix", "false"),  # would have been true
        (TrainConfig, "pairs_per_step", 4.5),
        (TrainConfig, "learning_rate", float("inf")),
        (DataConfig, "overflow", "cut"),
        (DataConfig, "workers", "many"),
        (ModelConfig, "dtype", "float16"),
        (LoraConfig, "rank", True),
        (LossConfig, "weights", [float("nan")]),
    ],
)
def test_a_value_given_in_python_is_checked_as_one_of_a_recipe(section: Any, key: str, value: Any) -> None:
    name = f"{section.__name__.removesuffix('Config').lower()}.{key}"
    with pytest.raises(UserError, match=rf"^{re.escape(name)}: wanted .*, got {re.escape(repr(value))}$"):
        section(**{key: value})


def test_numbers_and_tuples_of_python_are_put_in_the_types_of_the_recipe() -> None:
    train = TrainConfig(learning_rate=np.float32(0.5), pairs_per_step=np.int64(4))  # type: ignore[arg-type]
    loss = LossConfig(kind=("sigmoid", "sft"), weights=(1, "1e-1"))  # type: ignore[arg-type]
    config = DPOConfig(model=ModelConfig(name="m"), data=DataConfig(train="p.jsonl"), train=train, loss=loss)
    read = yaml.safe_load(config.to_yaml())
    assert config_from_dict(read) == config
    assert (read["train"]["learning_rate"], read["train"]["pairs_per_step"]) == (0.5, 4)
    assert (read["loss"]["kind"], read["loss"]["weights"]) == (["sigmoid", "sft"], [1.0, 0.1])


@pytest.mark.parametrize("name", ["model", "lora", "data", "loss", "train", "reference", "distributed"])
@pytest.mark.parametrize("value", [{"name": "m"}, "m", None, LossConfig, LossConfig()], ids=repr)
def test_a_section_that_is_no_section_is_refused_by_name(name: str, value: Any) -> None:
    sections: dict[str, Any] = {"model": ModelConfig(name="m"), "data": DataConfig(train="p.jsonl")}
    if (name, value) in (("lora", None), ("loss", LossConfig())):
        assert getattr(DPOConfig(**sections | {name: value}), name) == value
        return
    kind = f"{name.capitalize()}Config{' or None' if name == 'lora' else ''}"
    with pytest.raises(UserError) as caught:
        DPOConfig(**sections | {name: value})
    assert str(caught.value) == f"{name}: wanted a {kind}, got {value!r}"


def test_compiled_layers_are_refused_where_zero_3_swaps_their_weights(tmp_path: Path) -> None:
    told = mistake("", tmp_path, "train.compile=true", "distributed.zero_stage=3")
    assert "train.compile: wanted false with distributed.zero_stage 3" in told


@pytest.mark.parametrize(("number", "base"), [("010", 8), ("-0_7", 8), ("1:30", 60), ("1:30.5", 60)])
def test_numbers_that_yaml_reads_to_another_base_are_refused(number: str, base: int, tmp_path: Path) -> None:
    wanted = f"{number} is a number to the base {base} in YAML"
    assert wanted in mistake(f"train: {{max_steps: {number}}}\n", tmp_path)
    assert wanted in mistake("", tmp_path, f"train.max_steps={number}")


def test_numbers_with_a_zero_that_changes_nothing_are_read(tmp_path: Path) -> None:
    train = recipe("train: {seed: 00, max_steps: 0x10, grad_clip: 0.5, epochs: 08}\n", tmp_path).train
    assert (train.seed, train.max_steps, train.grad_clip, train.epochs) == (0, 16, 0.5, 8)


def test_a_rate_for_a_projector_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    told = mistake("", tmp_path, "train.projector_learning_rate=1e-4")
    assert "train.projector_learning_rate: wanted no value without model.train_projector, got 0.0001" in told
    recipe("", tmp_path, "train.projector_learning_rate=1e-4", "model.train_projector=true")


def test_evaluations_of_nothing_are_refused(tmp_path: Path) -> None:
    told = mistake("", tmp_path, "train.eval_every=5")
    assert "train.eval_every: wanted null without data.eval, got 5" in told
    assert recipe("", tmp_path, "train.eval_every=5", "data.eval=pope").train.eval_every == 5


def test_a_quantised_model_cannot_be_tuned_in_full(tmp_path: Path) -> None:
    assert "model.quantize" in mistake("", tmp_path, "lora=null", "model.quantize=nf4")


@pytest.mark.parametrize(
    "override",
    [
        "model.quantize=int8",
    ],
)
def test_a_capability_that_does_not_exist_yet_is_refused_by_name(override: str, tmp_path: Path) -> None:
    message = mistake("", tmp_path, override)
    assert f"{override.partition('=')[0]}: " in message and "not available in this version" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {seed: 1, seed: 2}\n", "not valid YAML: line 3: duplicate key 'seed'"),
        ("model: {name: again}\n", "not valid YAML: line 3: duplicate key 'model'"),
        ("train: [1\n", "not valid YAML: line 4"),
        ("\ttrain: 1\n", "not valid YAML: line 3"),
        ("? [a]\n: b\n", "not valid YAML: line 3"),
        ("--- {}\n", "not valid YAML: line 3"),
        ("track: !!python/object/apply:os.getcwd []\n", "not valid YAML: line 3"),
        ("track: " + 3000 * "[" + 3000 * "]" + "\n", "not valid YAML: nested too deeply"),
        ("train: {output: 2024-13-45}\n", "not valid YAML: month must be in 1..12"),
        ("train: {output: 2024-01-05}\n", "train.output: wanted text"),
        ("train: {seed: " + 5000 * "1" + "}\n", "not valid YAML: Exceeds the limit"),
        ("\0\n", "not valid YAML"),
        ("train: {output: !!timestamp 5}\n", "not valid YAML: a value does not fit its !!tag"),
    ],
)
def test_broken_yaml_names_the_file_and_where_it_breaks(text: str, said: str, tmp_path: Path) -> None:
    message = mistake(text, tmp_path)
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}: ") and said in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"just text", "wanted a mapping of sections, got str"),
        (b"- a\n- b\n", "wanted a mapping of sections, got list"),
        (b"model: {name: \xff}", "the recipe is not UTF-8 (byte 14)"),
        (b"", "model.name: wanted"),
    ],
)
def test_a_recipe_that_is_no_recipe_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ") and said in str(caught.value)


def test_a_missing_recipe_or_a_folder_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot read the recipe"):
            load_config(path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loss.beta", "wanted key=value"),
        ("=3", "wanted key=value"),
        ("loss.beta=[1", "the value is not valid YAML"),
        ("train.output=2024-13-45", "the value is not valid YAML"),
    ],
)
def test_a_malformed_override_is_named_instead_of_the_file(override: str, said: str, tmp_path: Path) -> None:
    message = mistake("", tmp_path, override)
    assert message.startswith(f"-s {override!r}: ") and said in message


@pytest.mark.parametrize("override", ["loss.beta.x=3", "loss=3", "a..b=1", "train.=3", "loss.beta="])
def test_an_override_that_fits_nowhere_is_refused(override: str, tmp_path: Path) -> None:
    assert "wanted" in (message := mistake("", tmp_path, override)) or "unknown key" in message


@pytest.mark.parametrize(
    ("text", "override", "told"),
    [
        ("model: {name: m}\ndata: {train: p}\n", "train.lr=1", "unknown key train.lr"),
        ("model: {name: m}\n", "train.epochs=much", "train.epochs: wanted"),
        ("model: {name: m}\n", "train.epochs=2", "r.yaml: data.train"),
        ("model: {name: m, nam: 1}\n", "train.epochs=2", "r.yaml: unknown key model.nam"),
    ],
)
def test_a_mistake_is_told_where_it_was_made(tmp_path: Path, text: str, override: str, told: str) -> None:
    """A wrong setting of the command line was blamed on the recipe's file."""
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as raised:
        load_config(tmp_path / "r.yaml", [override])
    assert str(raised.value).removeprefix(f"{tmp_path}/").startswith(told)
