"""The recipes under examples/ run, on a tiny model in place of theirs."""

from dataclasses import replace
from pathlib import Path

import pytest

from gossamer.recipes.recipe import Recipe
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

RECIPES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_run(path):
    recipe = replace(Recipe.read(path), model=None, out=None)
    with recipe.apply(tiny_model("llama"), None, random_tokens()) as applied:
        assert all(stage.report().sparsity > 0 for stage in applied.stages)


def test_one_recipe_composes_score_allocation_and_pattern():
    (path,) = [path for path in RECIPES if path.stem == "owl_sparsegpt_dsnot_24"]
    recipe = replace(Recipe.read(path), model=None)
    with recipe.apply(tiny_model("llama"), None, random_tokens()) as applied:
        (stage,) = applied.stages
        assert stage.report().sparsity == 0.5
        for name in stage.masks:
            counts = stage.selection(name).mask().reshape(-1, 4).sum(1)
            assert len(counts.unique()) == 1
