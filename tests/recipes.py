"""The recipes that convert any model: those that look for no blocks in it."""

from fp8kernels import RECIPES

ANYWHERE = {name: recipe for name, recipe in RECIPES.items() if recipe.high_precision_blocks == (0, 0)}
