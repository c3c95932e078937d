"""Words and arithmetic: the recipe, shapes, sizes, the plan. No torch."""
