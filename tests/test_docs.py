"""What documents say is what the program does."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import yaml


def test_no_document_holds_both_sides_of_a_merge(repository: Path) -> None:
    for page in [*repository.glob("*.md"), *repository.glob("docs/*.md")]:
        for line in page.read_text(encoding="utf-8").splitlines():
            assert not line.startswith(("<<<<<<< ", ">>>>>>> ")), f"{page.name}: {line}"


def test_settings_page_is_current(repository: Path) -> None:
    from fasttrain.settings_page import settings_page

    assert (repository / "docs" / "settings.md").read_text() == settings_page()


def test_the_page_of_commands_shows_their_help_as_it_is(repository: Path, tmp_path: Path) -> None:
    """After a change: python -m fasttrain.help_page. In a process of its own: click remembers how a command was first asked."""
    made = tmp_path / "cli.md"
    subprocess.run([sys.executable, "-m", "fasttrain.help_page", str(made)], check=True)
    assert (repository / "docs" / "cli.md").read_text(encoding="utf-8") == made.read_text(encoding="utf-8")


def test_every_recipe_loads(repository: Path) -> None:
    from fasttrain.config import load_config

    recipes = sorted((repository / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        load_config(recipe)


def test_the_readmes_recipe_loads(repository: Path) -> None:
    from fasttrain.config import config_from_dict

    text = (repository / "README.md").read_text()
    recipe = text.split("```yaml\n")[1].split("```")[0]
    assert config_from_dict(yaml.safe_load(recipe)).train.pairs_per_step == 64


def test_models_page_is_current(repository: Path) -> None:
    import re

    spec = importlib.util.spec_from_file_location("models_page", repository / "tests" / "models_page.py")
    assert spec is not None and spec.loader is not None
    models_page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models_page)
    text = (repository / "docs" / "models.md").read_text()
    version = re.search(r"Last made with transformers (\S+)\.\n", text)
    assert version and text == models_page.models_page(version[1])


def test_the_readmes_step_table_is_made_from_the_newest_results(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location("readme_table", repository / "bench" / "readme_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = module.newest_results(repository / "bench" / "results")
    readme = (repository / "README.md").read_text(encoding="utf-8")
    if results is None:  # nothing measured, nothing claimed
        assert module.BEGIN not in readme
        return
    assert readme == module.with_table(readme, module.table(results)), "run python bench/readme_table.py"


def _printed_texts(repository: Path) -> list[str]:
    """Every text in the sources; `…` for what is filled in, and the message of a bad row as it is put together."""
    import ast

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(text(value) for value in node.values)
        if isinstance(node, ast.BinOp):
            return text(node.left) + text(node.right)
        return "…"

    found = []
    for folder in ("fasttrain", "data_tools"):
        for path in (repository / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "BadRow":
                    field, wanted, got = [text(word) for word in node.args][-3:]
                    found.append(f"{field}: wanted {wanted}, got {got}")
                elif isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                    found.append(text(node))
    return found


def _is_told(message: str, texts: list[str]) -> bool:
    """Whether one text has all the fixed parts of a message, in order."""
    import re

    parts = [re.escape(part.strip()) for part in message.split("…") if part.strip(" :")]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return bool(parts) and any(pattern.search(text) for text in texts)


def test_every_message_of_the_troubleshooting_page_is_one_that_is_printed(repository: Path) -> None:
    page = (repository / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [line[5:-1] for line in page.splitlines() if line.startswith("### `")]
    assert len(messages) > 25
    texts = _printed_texts(repository)
    assert not _is_told("train.output: … is being used", texts)
    assert [message for message in messages if not _is_told(message, texts)] == []
