"""The layout keeps its promises: no package shadows Hugging Face's `kernels`, and `--help` needs no torch."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fasttrain_kernels

NOT_PACKAGES = ("kernels", "data_tools", "bench", "tests")
PACKAGES = {
    "fasttrain": "fasttrain",
    "fasttrain_kernels": "kernels/fasttrain_kernels",
    "fasttrain_data": "data_tools/fasttrain_data",
}
ALLOWED_IN_KERNELS = {"torch", "triton", *sys.stdlib_module_names}


def run_python(code: str, *arguments: str, folder: Path) -> str:
    """Standard output of `python -c code`, started in a folder (which is then first on sys.path)."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("folder", NOT_PACKAGES)
def test_folder_is_not_a_package(repository: Path, folder: str) -> None:
    assert not (repository / folder / "__init__.py").exists()


def test_kernels_folder_does_not_shadow_hugging_face_kernels(repository: Path) -> None:
    code = "import importlib.util; s = importlib.util.find_spec('kernels'); print(s.origin if s else None)"
    origin = run_python(code, folder=repository).strip()
    assert origin == "None" or "site-packages" in Path(origin).parts


def absolute_imports(path: Path, inside_functions: bool = True) -> set[str]:
    """Top-level names that a module imports absolutely."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"), filename=str(path))]
    names: set[str] = set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending.extend(ast.iter_child_nodes(node))
    return names


def test_kernels_import_only_torch_triton_and_the_standard_library(repository: Path) -> None:
    files = sorted((repository / PACKAGES["fasttrain_kernels"]).rglob("*.py"))
    foreign = {path.name: sorted(absolute_imports(path) - ALLOWED_IN_KERNELS) for path in files}
    assert files
    assert {name: names for name, names in foreign.items() if names} == {}


def test_data_tools_import_neither_torch_nor_the_trainer_at_module_level(repository: Path) -> None:
    for path in (repository / PACKAGES["fasttrain_data"]).rglob("*.py"):
        assert not {"torch", "transformers", "fasttrain"} & absolute_imports(path, inside_functions=False), (
            path
        )


def test_version_is_a_literal_and_the_installed_one(repository: Path) -> None:
    tree = ast.parse((repository / "fasttrain" / "__init__.py").read_text(encoding="utf-8"))
    values = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and [target.id for target in node.targets if isinstance(target, ast.Name)] == ["__version__"]
        and isinstance(node.value, ast.Constant)
    ]
    assert values == [importlib.metadata.version("fasttrain-dpo")]


@pytest.mark.slow
def test_wheel_holds_every_module_and_no_other_top_level_name(repository: Path, tmp_path: Path) -> None:
    # Built from a copy, so that an old build folder cannot lend files; without isolation, so that nothing is
    # downloaded and so that Hugging Face's kernels, a setuptools plugin, takes part where it is installed.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    for folder in ("fasttrain", "kernels", "data_tools"):
        shutil.copytree(repository / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(source),
    ]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    for package, folder in PACKAGES.items():
        files = {path.relative_to(source / folder).as_posix() for path in (source / folder).rglob("*.py")}
        assert {f"{package}/{file}" for file in (*files, "py.typed")} <= set(names)


# Asks a command group for its help and the help of each of its commands, in one process.
EVERY_HELP = """
import contextlib, importlib, io, json, sys
import click
module, its_group = (importlib.import_module(sys.argv[1] + name) for name in (".cli", sys.argv[2]))
group = next(value for value in vars(its_group).values() if isinstance(value, click.Group))
texts = {}
for name in ("", *group.list_commands(click.Context(group))):
    sys.argv = [sys.argv[0], *([name] if name else []), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        module.main()
    texts[name] = text.getvalue()
heavy = sorted({"torch", "transformers", "peft", "triton"} & set(sys.modules))
print(json.dumps({"texts": texts, "heavy": heavy}))
"""


@pytest.mark.parametrize(("package", "group"), [("fasttrain", ".cli"), ("fasttrain_data", ".commands.group")])
def test_every_help_answers_without_importing_torch(package: str, group: str, tmp_path: Path) -> None:
    answer = json.loads(run_python(EVERY_HELP, package, group, folder=tmp_path))
    assert answer["heavy"] == []
    assert [name for name, text in answer["texts"].items() if not text.startswith("Usage:")] == []
    assert "" in answer["texts"] and len(answer["texts"]) > 1


@pytest.mark.parametrize("package", ["fasttrain", "fasttrain_data"])
def test_package_runs_as_a_module(package: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", package, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage:")


@pytest.mark.slow
def test_type_checkers_see_what_every_kernel_takes_and_returns(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    lines = [f"reveal_type(fasttrain_kernels.{name})" for name in fasttrain_kernels.__all__]
    user = tmp_path / "user.py"
    user.write_text("\n".join(["import fasttrain_kernels", *lines]))
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(user)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    revealed = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(lines), done.stdout + done.stderr
    assert not [line for line in revealed if '"Any"' in line]
