"""What documents say is what the program does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import yaml


def test_settings_page_is_current(repository: Path) -> None:
    from fasttrain.settings_page import settings_page

    assert (repository / "docs" / "settings.md").read_text() == settings_page()


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
