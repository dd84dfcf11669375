"""The command line: a mistake is one line and exit code 2, results go to stdout."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from fasttrain import cli


def mistake(answer: Any) -> str:
    """What the one line on stderr says."""
    assert answer.code == 2 and answer.out == ""
    (line,) = answer.err.splitlines()
    assert line.startswith("fasttrain: error: ")
    return line.removeprefix("fasttrain: error: ")


# ---- words on the command line -------------------------------------------------------------------------------------


def test_help_of_every_command_that_takes_a_recipe_shows_an_example(fasttrain: Any) -> None:
    commands = cli.cli.commands
    for name in ("dpo", "reference"):
        assert f"  fasttrain {name} -c recipe.yaml" in fasttrain(name, "--help").out
    for name, command in commands.items():
        answer = fasttrain(name, "--help")
        assert answer.code == 0 and answer.out.startswith(f"Usage: fasttrain {name}") and answer.err == ""
        if any(param.name == "recipe" for param in command.params):
            examples = answer.out.count(f"\n    fasttrain {name} ")
            assert f"{'Example' if examples == 1 else 'Examples'}:\n    fasttrain {name} " in answer.out


def test_the_bare_command_shows_help_and_says_that_nothing_was_asked(fasttrain: Any) -> None:
    answer = fasttrain()
    assert answer.code == 2 and answer.err.startswith("Usage: fasttrain ") and "\n  dpo " in answer.err


def test_version_and_help_go_to_stdout(fasttrain: Any) -> None:
    assert fasttrain("--version").out.startswith("fasttrain, version 0.")
    for word in ("-h", "--help"):
        assert fasttrain(word).out.startswith("Usage: fasttrain ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dpo"], "Missing option '-c' / '--config'"),
        (["dpo", "-c"], "Option '-c' requires an argument"),
        (["dpo", "-c", "r.yaml", "--resum"], "No such option '--resum'. Did you mean '--resume'?"),
        (["dopo"], "No such command 'dopo'. Did you mean 'dpo'?"),
        (["env", "--nope"], "No such option '--nope'"),
        (["dpo", "-c", "r.yaml", "loss.beta=0.2"], "unexpected 'loss.beta=0.2'; did you mean -s loss.beta=0.2?"),
        (["dpo", "loss.beta=0.2", "-c", "r.yaml"], "unexpected 'loss.beta=0.2'; did you mean -s loss.beta=0.2?"),
        (["dpo", "-c", "r.yaml", "--dry-run", "loss.beta=0.2"], "did you mean -s loss.beta=0.2?"),
        (["dpo", "-c", "r.yaml", "-s", "lora.rank=8", "loss.beta=0.2"], "did you mean -s loss.beta=0.2?"),
        (["dpo", "-c", "r.yaml", "more"], "Got unexpected extra argument (more)"),
        (["dpo", "-c", "none.yaml"], "none.yaml: cannot read the recipe: No such file or directory"),
        (["dpo", "-c", "folder.of=1/none.yaml"], "folder.of=1/none.yaml: cannot read the recipe"),
        (["dpo", "-c", "a.b=1"], "a.b=1: cannot read the recipe"),
        (["dpo", "--config", "a.b=1"], "a.b=1: cannot read the recipe"),
        (["dpo", "-c", "r.yaml", "--resume", "--overwrite"], "--resume and --overwrite: wanted one of them, got both"),
        (["reference", "-c", "none.yaml"], "none.yaml: cannot read the recipe"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_command_is_one_line(words: list[str], said: str, fasttrain: Any) -> None:
    assert said in mistake(fasttrain(*words))


def test_usage_errors_point_at_the_help_of_their_command(fasttrain: Any) -> None:
    assert mistake(fasttrain("dpo", "--nope")).endswith("(see fasttrain dpo --help)")
    assert mistake(fasttrain("dopo")).endswith("(see fasttrain --help)")


def test_a_program_that_has_no_arguments_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program with Python inside may leave sys.argv empty: a run ended as it wrote environment.json."""
    from fasttrain.environment import collect_facts

    monkeypatch.setattr(sys, "argv", [])
    assert collect_facts()["command"] == []


def test_env_names_versions_and_backends(fasttrain: Any) -> None:
    facts = json.loads(fasttrain("env", "--json").out)
    assert facts["versions"]["torch"] and facts["head_backend"]
    assert facts["attention_backend"] in ("flash", "flex", "sdpa") and facts["attention_reason"]
    assert set(facts["attention_cannot"]) <= {"flash", "flex"} and all(facts["attention_cannot"].values())
    assert "transformers" in fasttrain("env").out


# ---- mistakes in recipe, data and model ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["dpo", "reference"])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learnin_rate=1", "unknown key train.learnin_rate; did you mean 'learning_rate'?"),
        ("train.pairs_per_step=many", "train.pairs_per_step: wanted an integer, got 'many'"),
        ("model.attention=flash", "model.attention: wanted a backend that can run here, got flash: flash-attn wants a CUDA"),
        ("model.attention=flex", "model.attention: wanted a backend that can run here, got flex: FlexAttention wants a CUDA"),
        ("data.train=none.jsonl", "none.jsonl: data.train/data.eval: wanted a pair file or folder"),
        ("data.image_root=none", "data.image_root: wanted an existing folder, got 'none'"),
        ("data.eval=recipe.yaml", "recipe.yaml: wanted .jsonl, .json, .parquet or a datasets folder, got .yaml"),
        ("model.name=./none", "model.name: wanted a model folder or hub id, got ./none"),
        ("data.max_length=5", "pairs.jsonl line 1: prompt: wanted fewer than data.max_length = 5 tokens, got "),
        ("lora.init_from=none", "lora.init_from: "),
    ],
)  # fmt: skip
def test_a_mistake_in_the_recipe_is_one_line(
    command: str, override: str, said: str, project: Path, fasttrain: Any
) -> None:
    assert said in mistake(fasttrain(command, "-c", project, "-s", override))


GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}


def change_row(line: int, **changes: Any) -> None:
    """Change fields of a row of pairs.jsonl in the working folder."""
    path = Path("pairs.jsonl")
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    rows[line - 1].update(changes)
    path.write_text("\n".join(map(json.dumps, rows)))


def append_line(text: str) -> None:
    path = Path("pairs.jsonl")
    path.write_text(path.read_text() + text)


def change_image(content: bytes) -> None:
    Path("images/0.png").write_bytes(content)


def jpeg() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((60, 40), 80).save(buffer, "JPEG")
    return buffer.getvalue()


BAD_DATA: dict[str, tuple[Callable[[], object], str]] = {
    "missing image": (Path("images/0.png").unlink, r"line 1: images: wanted an existing image file, got .*/0\.png"),
    "text named .png": (lambda: change_image(b"text"), r"line 1: images: wanted an image, got .*/0\.png \(not a file"),
    "truncated picture": (lambda: change_image(jpeg()[:-200]), r"line 1: images: wanted an image, got .*/0\.png: broken"),
    "image outside": (lambda: change_row(2, images=["../x.png"]), r"line 2: images: wanted a path inside the image root"),
    "name that would steer a terminal": (
        lambda: change_row(2, images=["\x1b]0;title\x07\u202e.png"]),
        r"line 2: images: wanted an existing image file, got .*/\\x1b]0;title\\x07\\u202e\.png",
    ),
    "too many images": (
        lambda: change_row(2, images=["images/0.png", "images/0.png"]),
        r"line 2: images: wanted as many images as placeholders in the prompt \(1\), got 2 image\(s\)",
    ),
    "no image": (lambda: change_row(2, images=None), r"line 2: images: wanted as many .*\(1\), got none under images or image"),
    "empty completion": (lambda: change_row(3, chosen=" "), r"line 3: chosen: wanted a non-empty answer, got ' '"),
    "equal answers": (lambda: change_row(3, chosen="a", rejected="a"), r"line 3: rejected: wanted an answer that differs"),
    "no JSON": (lambda: append_line("nope\n"), r"line 7: row: wanted a JSON object, got invalid JSON"),
    "image token in an answer": (lambda: change_row(4, rejected="<image>"), r"line 4: rejected: wanted no image placeholder"),
    "end token in an answer": (lambda: change_row(4, chosen="a</s>b"), r"line 4: chosen: wanted no end-of-turn token"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_DATA)
def test_a_mistake_in_the_data_is_one_line_with_file_line_and_field(
    kind: str, images: Path, fasttrain: Any
) -> None:
    spoil, said = BAD_DATA[kind]
    spoil()
    assert re.search(r"^pairs\.jsonl " + said, mistake(fasttrain("dpo", "-c", images)))


def test_an_image_for_a_text_model_is_the_users_mistake(
    images: Path, tiny_text: Path, fasttrain: Any
) -> None:
    said = mistake(fasttrain("dpo", "-c", images, "-s", f"model.name={tiny_text}"))
    assert (
        said
        == "pairs.jsonl line 1: images: wanted a text-only row for a model that is run on text only (docs/models.md), got an image"
    )


def spoil_model(folder: Path, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    if how == "no weights":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "broken config":
        (folder / "config.json").write_text("{")
    elif how == "unknown type":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    elif how == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif how == "no template":
        (folder / "chat_template.jinja").unlink()
    elif how == "other shapes":
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    elif how == "other layers":
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no weights", "model.name: wanted safetensors weights in "),
        ("no config", "model.name: wanted a model folder with config.json, got "),
        ("broken config", "model.name: cannot read "),
        (
            "unknown type",
            "model.name: wanted a causal language model or a vision-language model around one, got model type 't5'",
        ),
        ("no tokenizer", "model.name: cannot load a tokenizer from "),
        ("no template", "model.name: wanted a model with a chat template"),
        ("other shapes", "model.name: "),
        ("other layers", "model.name: wanted every weight in "),
    ],
)
def test_a_model_folder_that_does_not_hold_together_is_named(
    how: str, said: str, project: Path, tiny_text: Path, tmp_path: Path, fasttrain: Any
) -> None:
    shutil.copytree(tiny_text, tmp_path / "model")
    spoil_model(tmp_path / "model", how)
    assert said in mistake(fasttrain("dpo", "-c", project, "-s", "model.name=model"))


def test_an_output_folder_in_use_is_refused_and_left_alone(project: Path, fasttrain: Any) -> None:
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")
    said = "train.output: run is in use; --resume goes on with it, --overwrite starts anew"
    for words in ([], ["--dry-run"]):
        assert mistake(fasttrain("dpo", "-c", project, *words)) == said
    assert [path.name for path in Path("run").iterdir()] == ["notes.txt"]


def test_an_output_that_cannot_be_a_folder_is_named(project: Path, fasttrain: Any) -> None:
    said = mistake(fasttrain("dpo", "-c", project, "-s", "train.output=recipe.yaml/run"))
    assert said.startswith("train.output: cannot make recipe.yaml/run: ")


def test_data_with_no_usable_pair_says_why(project: Path, fasttrain: Any) -> None:
    said = mistake(fasttrain("dpo", "-c", project, "-s", "data.max_length=5", "-s", "data.overflow=drop"))
    assert said.startswith(
        "pairs.jsonl: wanted at least one usable pair, got none (prompt: wanted fewer than"
    )


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_prints_its_result_and_where_it_is(project: Path, fasttrain: Any) -> None:
    answer = fasttrain("dpo", "-c", project)
    assert answer.code == 0
    assert re.fullmatch(
        r"loss \d\.\d{4}, rewards/margins -?\d\.\d{3} at step 3\nrun folder: run\nadapter: run/final\n",
        answer.out,
    )
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 3
    assert yaml.safe_load(Path("run/config.yaml").read_text())["lora"]["rank"] == 4


def test_bad_rows_are_skipped_when_asked_and_listed_in_the_run_folder(images: Path, fasttrain: Any) -> None:
    change_image(b"text")
    append_line('nope\n{"id": "\\ud800", "prompt": "q", "chosen": "", "rejected": "b"}\n')
    assert fasttrain("dpo", "-c", images, "-s", "data.on_bad_row=skip").code == 0
    skipped = [json.loads(line) for line in Path("run/skipped.jsonl").read_text().splitlines()]
    assert [line["where"] for line in skipped] == [
        "pairs.jsonl line 7",
        "pairs.jsonl line 8",
        "pairs.jsonl line 1",
    ]
    assert [line["reason"].partition(":")[0] for line in skipped] == ["row", "chosen", "images"]


def test_an_image_that_decodes_to_nothing_is_skipped_by_the_fill_when_asked(
    images: Path, fasttrain: Any
) -> None:
    change_image(jpeg()[:-200])  # its header is sound
    assert fasttrain("dpo", "-c", images, "-s", "data.on_bad_row=skip").code == 0
    (line,) = Path("run/skipped.jsonl").read_text().splitlines()
    assert "broken image" in json.loads(line)["reason"]


def test_columns_that_are_not_read_are_told(images: Path, fasttrain: Any) -> None:
    assert "is not read" not in fasttrain("dpo", "-c", images, "--dry-run").err
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    renamed = [
        {"system": "Be short.", "image_path": row["images"][0], **{key: row[key][-1]["content"][-1]["text"] for key in ("prompt", "chosen", "rejected")}}
        for row in rows
    ]  # fmt: skip
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    said = fasttrain("dpo", "-c", images, "--dry-run").err
    assert "warning: pairs.jsonl line 1: image_path is not read; images go under images or image" in said
    assert (
        "warning: pairs.jsonl line 1: system is not read; a system turn stands at the head of prompt" in said
    )


def test_a_system_column_is_told_for_models_of_text_too(project: Path, fasttrain: Any) -> None:
    append_line(
        '{"system": "Be short.", "prompt": "q", "chosen": "a", "rejected": "b", "image_path": "a.png"}'
    )
    rows = Path("pairs.jsonl").read_text().splitlines()
    Path("pairs.jsonl").write_text("\n".join(rows[-1:] + rows[:-1]) + "\n")
    said = fasttrain("dpo", "-c", project, "--dry-run").err
    assert "warning: pairs.jsonl line 1: system is not read" in said and "image_path" not in said


def test_reference_says_what_it_computed_and_computes_it_once(
    project: Path, fasttrain: Any, fresh_cache: Path
) -> None:
    completions = count_completions(Path("pairs.jsonl"))
    first, second = (fasttrain("reference", "-c", project) for _ in range(2))
    assert f"completions: {completions}, computed now: {completions}\n" in first.out
    assert f"completions: {completions}, computed now: 0\n" in second.out
    assert f"cache: {fresh_cache / 'reference'}" in first.out and not Path("run").exists()


def count_completions(path: Path) -> int:
    """Distinct answers per prompt."""
    found = set()
    for row in map(json.loads, path.read_text().splitlines()):
        found |= {(str(row["prompt"]), str(row["chosen"])), (str(row["prompt"]), str(row["rejected"]))}
    return len(found)


def numbers(report: str, name: str) -> list[float]:
    """The numbers in the line of a dry run's report that starts with a name."""
    (line,) = [line for line in report.splitlines() if line.startswith(name + " ")]
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", line)]


def test_a_dry_run_counts_rightly_and_writes_nothing(
    images: Path, fasttrain: Any, tiny_models: ModuleType, tmp_path: Path, fresh_cache: Path
) -> None:
    rows = tiny_models.read_rows(Path("pairs.jsonl"))
    prompts = {str(row["prompt"]): row["images"] for row in rows}

    def files() -> list[Path]:
        return sorted(path for path in tmp_path.rglob("*") if fresh_cache not in (path, *path.parents))

    before = files()
    answer = fasttrain(
        "dpo", "-c", images, "--dry-run", "-s", "train.pairs_per_step=4", "-s", "train.epochs=3"
    )
    assert answer.code == 0 and answer.err == "" and answer.out.endswith("nothing was trained\n")
    assert files() == before
    images_used = sum(map(len, prompts.values()))
    assert numbers(answer.out, "data") == [len(rows), len(rows), len(prompts), images_used]
    assert numbers(answer.out, "left out") == [0, 0]
    assert numbers(answer.out, "reference")[:2] == [0, count_completions(Path("pairs.jsonl"))]
    total = fasttrain("dpo", "-c", images, "-s", "train.pairs_per_step=4", "-s", "train.epochs=3").out
    assert numbers(answer.out, "steps")[0] == float(re.search(r"at step (\d+)", total).group(1))  # type: ignore[union-attr]
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    for name in ("tokens", "tokens_unshared"):
        mean = sum(line[name] for line in metrics) / len(metrics)
        assert int(mean) in numbers(answer.out, "tokens")


def test_a_dry_run_opens_every_image(images: Path, fasttrain: Any) -> None:
    change_image(jpeg()[:-200])
    assert "images: wanted an image, got" in mistake(fasttrain("dpo", "-c", images, "--dry-run"))
    answer = fasttrain("dpo", "-c", images, "--dry-run", "-s", "data.on_bad_row=skip")
    assert answer.code == 0 and numbers(answer.out, "left out")[0] == 1
    assert numbers(answer.out, "data")[3] == len(list(Path("images").iterdir())) - 1


def test_the_installed_command_answers_a_mistake_with_one_line_and_exit_code_2(project: Path) -> None:
    change_row(5, chosen="")
    command = Path(sys.executable).with_name("fasttrain")
    done = subprocess.run([command, "dpo", "-c", project], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fasttrain: error: pairs.jsonl line 5: chosen: wanted a non-empty answer, got ''\n"
