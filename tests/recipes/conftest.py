from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import ckptsurgery as cs


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long the recipes are, for those who want to make them shorter."""
    passed = terminalreporter.stats.get("passed", ())
    ran = any("tests/recipes/" in report.nodeid for report in passed)
    if not ran:
        return
    import ckptsurgery as cs

    counts = sorted(((rules_of(cs.load_recipe(n)), n) for n in cs.list_recipes()), reverse=True)
    terminalreporter.section("rules in each recipe")
    terminalreporter.write_line(", ".join(f"{name} {count}" for count, name in counts))


def rules_of(recipe: cs.Recipe) -> int:
    """Rules and fallbacks that a recipe itself holds, in its scopes and stages too."""
    parts = [recipe, *recipe.stages, *(s.recipe for r in (recipe, *recipe.stages) for s in r.scopes)]
    return sum(len(p.rules) + (p.fallback is not None) for p in parts)
