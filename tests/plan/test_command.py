"""The command `fasttrain plan`: works on a fresh clone without network, for every recipe, and answers mistakes in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from fasttrain.cli import cli
from fasttrain.config import load_config
from fasttrain.errors import UserError
from fasttrain.plan.gpus import find_gpu
from fasttrain.plan.histogram import parse_lengths
from fasttrain.plan.known_models import KNOWN

FOLDER = Path(__file__).parents[2] / "recipes"
NAMES = (
    "llava15_13b_paper", "llava15_7b_lora", "llava15_7b_full_zero3", "qwen25vl_7b_lora", "llava15_7b_qlora_24gb",
)  # fmt: skip
RECIPES = [FOLDER / f"{name}.yaml" for name in NAMES]


def plan(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["plan", *arguments])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.exception
    return result.stdout


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_names_a_known_model_and_shows_its_plan(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.model.name in KNOWN
    comment = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(line.startswith(f"#   fasttrain plan -c recipes/{recipe.name} --gpu ") for line in comment)
    assert any("bound by" in line for line in comment)


@pytest.mark.slow
def test_the_page_about_plans_shows_what_is_printed_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (FOLDER.parent / "docs" / "plan.md").read_text(encoding="utf-8")
    shown = page[page.index("model       ") : page.index("\n```", page.index("model       "))]
    monkeypatch.chdir(tmp_path)  # without pairs
    printed = plan("-c", str(FOLDER / "llava15_13b_paper.yaml"), "--gpu", "a100-80g", "--gpus", "4").rstrip()
    tables = printed[printed.index("memory per GPU") : printed.index("Assumed: ")]
    assert max(map(len, tables.splitlines())) <= 80
    number = re.compile(r"\d[\d,]*(?:\.\d+)?")
    assert number.sub("", shown).split() == number.sub("", printed).split()
    for line, now in zip(shown.splitlines(), printed.splitlines(), strict=True):
        values = [[float(word.replace(",", "")) for word in number.findall(text)] for text in (line, now)]
        assert values[0] == pytest.approx(values[1], rel=0.01, abs=0.02), (
            line
        )  # other versions count a little else


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_head_has_the_rows_of_the_page_about_plans(recipe: Path) -> None:
    """In its order and words; the slow test above compares the page with what is printed."""
    page, head = ((path.read_text(encoding="utf-8")) for path in (FOLDER.parent / "docs" / "plan.md", recipe))
    labels = [
        [re.split(r"  +|\d", line.lstrip("# "))[0] for line in text.splitlines() if re.match(prefix, line)]
        for text, prefix in ((page, " {2,}[a-zA-Z]"), (head, "# {5,}[a-zA-Z]"))
    ]
    assert labels[0] == labels[1]
    tables = [re.search(r"data +[\d,]+ (pairs .*)", text) for text in (page, head)]
    assert tables[0] and tables[1] and tables[0][1] == tables[1][1]


def _shrunk(name: str) -> dict[str, Any]:
    """A known model with its family and few, narrow layers."""
    sizes = json.loads(json.dumps(KNOWN[name]))
    small = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    sizes["text_config"] |= small | {"vocab_size": 512}
    sizes["text_config"].pop("rope_parameters", None)
    vision = sizes["vision_config"]
    if "depth" in vision:
        vision |= {
            "depth": 2,
            "hidden_size": 64,
            "out_hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 4,
        }
        sizes["text_config"]["rope_parameters"] = {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3],
        }  # fmt: skip
    else:
        vision |= {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
    return sizes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_plan_runs_on_every_recipe_from_a_config_alone(recipe: Path, tmp_path: Path) -> None:
    sizes = _shrunk(load_config(recipe).model.name)
    (tmp_path / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    text = plan(
        "-c", str(recipe), "-s", f"model.name={tmp_path}", "--gpus", "4", "--lengths", "600,50,300", "--json"
    )
    answer = json.loads(text)
    assert [stage["stage"] for stage in answer["stages"]] in ([0, 2, 3], [0, 2])
    assert all(stage["fits"] and stage["step_s"] > 0 for stage in answer["stages"])
    assert answer["data"]["pairs"] == 300
    if recipe.stem == "llava15_7b_lora":
        page = plan(
            "-c", str(recipe), "-s", f"model.name={tmp_path}", "--gpu", "h100", "--lengths", "600,50,300"
        )
        assert "one GPU" in page and "H100" in page and "bound by" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h10"], "--gpu: wanted one of a100-40g, .*did you mean"),
        (["--gpus", "0"], "--gpus: wanted at least 1, got 0"),
        (["--lengths", "600"], "--lengths: wanted PROMPT,COMPLETION,COUNT"),
        (["--lengths", "600,0,5"], "each at least 1, got '600,0,5'"),
        (["--matrix-share", "1.5"], "--matrix-share: wanted a share above 0 and up to 1"),
        (
            ["-s", "model.name=nobody/nothing"],
            "model.name: wanted a folder with config.json, a model in the local hub cache",
        ),
        (["-s", "model.name=/"], "model.name: wanted a model folder with config.json"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan("-c", str(FOLDER / "llava15_7b_lora.yaml"), *arguments)


def test_lengths_of_several_kinds_add_up() -> None:
    data = parse_lengths(["600,100,20", "50,30,5"], images=1)
    assert (len(data), data.pair_total, data.tokens) == (25, 25, 20 * 800 + 5 * 110)
    assert data.lengths(19).tolist() == [600, 100, 100] and data.lengths(20).tolist() == [50, 30, 30]


@pytest.mark.parametrize(
    "family", ["LLaVA-1.5", "LLaVA-NeXT", "Gemma 3", "PaliGemma", "Pixtral", "Qwen2.5-VL"]
)
def test_a_tower_that_is_not_counted_is_said_not_to_be(
    family: str, tiny_llava: Path, tiny_families: ModuleType, tiny_models: ModuleType, tmp_path: Path
) -> None:
    folder = tiny_llava if family == "LLaVA-1.5" else tmp_path
    if folder == tmp_path:
        tiny_families.FAMILIES[family](tiny_models)[0].save_pretrained(tmp_path)
    recipe = FOLDER / "llava15_7b_lora.yaml"
    words = ("-c", str(recipe), "-s", f"model.name={folder}", "--lengths", "300,40,5", "--json")
    answer = json.loads(plan(*words))
    counted = answer["stages"][0]["memory"]["images"] > 0
    assert counted == (family == "LLaVA-1.5")
    assert any("only the weights are counted" in note for note in answer["notes"]) != counted


def test_a_sequence_longer_than_a_pack_decides_what_fits(tmp_path: Path) -> None:
    recipe = FOLDER / "llava15_7b_qlora_24gb.yaml"
    sizes = _shrunk(load_config(recipe).model.name)
    (tmp_path / "config.json").write_text(json.dumps(sizes), encoding="utf-8")

    def stage(lengths: str) -> dict[str, Any]:
        words = ("-c", str(recipe), "-s", f"model.name={tmp_path}", "--gpu", "rtx4090")
        answer = json.loads(plan(*words, "-s", "train.tokens_per_pack=2048", "--lengths", lengths, "--json"))
        assert len(answer["notes"]) == (answer["data"]["longest_sequence"] > 2048)
        return dict(answer["stages"][0])

    short, long = stage("1000,500,9"), stage("9000,500,9")
    assert short["fits"] and long["fits"] and long["peak_bytes"] > 2 * short["peak_bytes"]
    too_long = stage("40000000,500,9")
    assert not too_long["fits"] and too_long["peak_bytes"] > too_long["usable_bytes"]
    assert too_long["tokens_per_pack"] == 2048 < too_long["largest_checkpointed"]


def test_lengths_come_from_the_pair_file_when_there_is_a_tokenizer(
    tiny_text: Path, text_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    pairs = text_pairs(tmp_path / "pairs.jsonl", 9)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: {tiny_text}}}\nlora: {{rank: 4}}\ndata: {{train: {pairs}}}\n", encoding="utf-8"
    )
    answer = json.loads(plan("-c", str(recipe), "--json"))
    assert answer["data"]["pairs"] == 9 and answer["data"]["source"] == str(pairs)
    assert answer["stages"][0]["work"]["tokens"] > 0


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts files of a model folder into a hub cache, as a download would; returns the hub id."""

    def put(folder: Path, *names: str) -> str:
        place = tmp_path / "hub" / "models--tiny--model"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("1" * 40)
        shutil.copytree(
            folder,
            place / "snapshots" / ("1" * 40),
            ignore=lambda _, found: set(found) - set(names) if names else set(),
        )
        return "tiny/model"

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return put


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_lengths_come_from_the_pair_file_when_the_hub_cache_has_the_tokenizer(
    kind: str, cached: Callable[..., str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue("tiny_text" if kind == "text" else "tiny_llava")
    made = request.getfixturevalue(f"{kind}_pairs")
    pairs = made(tmp_path / "pairs.jsonl" if kind == "text" else tmp_path / "pairs", 7)
    recipe = tmp_path / "recipe.yaml"

    def answer(name: object) -> Any:
        recipe.write_text(
            f"model: {{name: {name}}}\nlora: {{rank: 4}}\ndata: {{train: {pairs}}}\n", encoding="utf-8"
        )
        return json.loads(plan("-c", str(recipe), "--json"))["data"]

    assert answer(cached(folder)) == answer(folder)
    assert answer(folder)["source"] == str(pairs)


@pytest.mark.parametrize("folder", ["tiny_text", "tiny_llava"])
def test_a_hub_cache_without_the_tokenizer_is_named_beside_typical_lengths(
    folder: str, cached: Callable[..., str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("never read", encoding="utf-8")
    name = cached(request.getfixturevalue(folder), "config.json")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: {name}}}\nlora: {{rank: 4}}\ndata: {{train: {pairs}}}\n", encoding="utf-8"
    )
    source = json.loads(plan("-c", str(recipe), "--json"))["data"]["source"]
    assert source.startswith("typical lengths") and "hub cache has no tokenizer" in source


RECIPE = """
model: {name: MODEL}
data: {train: pairs.jsonl}
lora: {rank: 4, alpha: 8}
"""


@pytest.mark.parametrize(
    "settings",
    [
        ["loss.router_aux_weight=0.1"],
        ["loss.label_smoothing=0.1", "loss.kind=ipo"],
        ["loss.kind=sft", "loss.ld_alpha=0.5"],
        ["model.revision=main"],
        ["model.quantize=nf4", "distributed.zero_stage=3"],
        ["distributed.zero_stage=2", "distributed.deepspeed_config=absent.json"],
        ["lora={init_from: absent}"],
        ["lora={init_from: alora}"],
        ["lora={init_from: replicated}"],
        ["lora={init_from: plain, rank: 8}"],
        ["lora={init_from: plain, targets: [q_proj]}"],
        ["data.eval=absent.jsonl", "train.eval_every=1"],
        ["data.eval_questions=3"],
        ["model.name=few-embeddings"],
    ],
)
def test_plan_refuses_what_dpo_refuses_in_the_same_words(
    settings: list[str], tiny_text: Path, tiny_models: ModuleType, text_pairs: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from fasttrain.train.loop import train_dpo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(tiny_text)))
    text_pairs(tmp_path / "pairs.jsonl", 4)
    changes = {
        "plain": {}, "alora": {"alora_invocation_tokens": [5]}, "replicated": {"layer_replication": [[0, 2], [0, 1]]},
    }  # fmt: skip
    tiny_models.build_text(tmp_path / "few-embeddings", vocab_size=200)
    for name, change in changes.items():
        tiny_models.build_adapter(tiny_text, tmp_path / name)
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    overrides = [f"train.output={tmp_path / 'run'}", *settings]
    with pytest.raises(UserError) as planned:
        plan("-c", "recipe.yaml", *(word for entry in overrides for word in ("-s", entry)))
    with pytest.raises(UserError) as trained:
        train_dpo(load_config("recipe.yaml", overrides))
    assert str(planned.value) == str(trained.value)


def test_a_note_about_experts_is_said_once(
    tiny_models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_models.build_mixture(tmp_path / "mixture")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(model)))
    result = CliRunner().invoke(cli, ["plan", "-c", "recipe.yaml", "--gpus", "4", "--lengths", "50,20,9"])
    assert result.exit_code == 0, result.exception
    assert result.stderr.count("the fused weights of the experts") == 1


def test_a_loss_that_couples_pairs_is_planned_to_run_every_pack_twice(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(tiny_text)))
    common = ("-c", "recipe.yaml", "--lengths", "50,20,9", "--json")
    one, two = (
        json.loads(plan(*common, "-s", f"loss.kind={kind}"))["stages"][0] for kind in ("sigmoid", "aot")
    )
    assert two["work"]["tokens"] == 2 * one["work"]["tokens"]


def test_a_routers_loss_is_planned_to_run_every_pack_twice_where_a_step_has_several(
    tiny_models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        RECIPE.replace("MODEL", str(tiny_models.build_mixture(tmp_path / "m")))
    )

    def tokens(size: int, weight: float) -> float:
        settings = (
            f"loss.router_aux_weight={weight}",
            f"train.tokens_per_pack={size}",
            "train.pairs_per_step=9",
        )
        words = [word for setting in settings for word in ("-s", setting)]
        answer = json.loads(plan("-c", "recipe.yaml", "--lengths", "50,20,9", "--json", *words))
        return float(answer["stages"][0]["work"]["tokens"])

    assert tokens(200, 0.1) == 2 * tokens(200, 0) > 0
    assert tokens(9999, 0.1) == tokens(9999, 0)


def test_what_a_model_cannot_run_is_not_planned(
    tiny_text: Path,
    tiny_families: ModuleType,
    tiny_models: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts of a model that shares none are planned unshared, images with every answer; a table of positions ends plan."""
    import transformers

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(tiny_text)))
    words = ("-c", "recipe.yaml", "--lengths", "300,40,6", "--json", "-s", "train.pairs_per_step=6")
    tiny_families.FAMILIES["Mllama"](tiny_models)[0].save_pretrained(tmp_path / "mllama")
    answer = json.loads(plan(*words, "-s", "model.name=mllama"))
    assert answer["stages"][0]["work"]["tokens"] == 6 * 2 * 340
    assert "cannot share prefixes" in answer["notes"][0]
    transformers.GPT2Config(n_positions=64, n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="cannot run the longest sequence of 340 tokens: it has 64 positions"):
        plan(*words, "-s", "model.name=gpt2", "-s", "lora=null")
    with pytest.raises(UserError, match=r"model\.attention: .* flash-attn wants bfloat16"):
        plan(*words, "-s", "model.dtype=float32", "-s", "model.attention=flash")
    with pytest.raises(UserError, match=r"data\.eval: wanted pair files with several ranks"):
        (tmp_path / "mmbench").mkdir()
        (tmp_path / "mmbench" / "dev.tsv").touch()
        plan(*words, "--gpus", "2", "-s", "data.eval=mmbench", "-s", "train.eval_every=1")


def test_a_pack_of_unshared_prompts_is_planned_with_all_its_copies_of_them(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(tiny_llava)))
    words = ("-c", "recipe.yaml", "--lengths", "500,40,64", "--json", "-s", "train.tokens_per_pack=1000000")
    once, copied = (
        json.loads(plan(*words, "-s", f"train.share_prefix={shared}"))["stages"][0]["memory"]
        for shared in ("true", "false")
    )
    assert copied["images"] == pytest.approx(2 * once["images"], rel=0.1)
    assert copied["activations"] > 1.7 * once["activations"]


def test_checkpointing_of_unshared_prompts_is_settled_as_a_run_settles_it(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run asks whether the group fits, 1,700 tokens, and at least 2,048; plan asked for its 3,200 with the prompt twice."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(tiny_llava)))
    words = ("-c", "recipe.yaml", "--lengths", "1500,100,64", "--json", "-s", "train.share_prefix=false")

    def stage(*more: str) -> dict[str, Any]:
        return dict(json.loads(plan(*words, *more))["stages"][0])

    plain = ("-s", "train.gradient_checkpointing=false", "-s", "train.tokens_per_pack=2600")
    share = stage(*plain)["peak_bytes"] / find_gpu("a100-80g").memory_bytes
    assert stage("--memory-share", str(share))["checkpointing"] is False
