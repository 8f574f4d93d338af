from __future__ import annotations

from pathlib import Path

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long the recipes are, for those who want to make them shorter."""
    here = (
        str(Path(__file__).parent.relative_to(Path.cwd())) if Path(__file__).is_relative_to(Path.cwd()) else "recipes"
    )
    ran = [
        r for reports in terminalreporter.stats.values() for r in reports if getattr(r, "nodeid", "").startswith(here)
    ]
    if not ran:
        return
    import ckptsurgery as cs

    counts = sorted(((rules_of(cs.load_recipe(n)), n) for n in cs.list_recipes()), reverse=True)
    terminalreporter.section("rules in each recipe")
    terminalreporter.write_line(", ".join(f"{name} {count}" for count, name in counts))


def rules_of(recipe) -> int:  # type: ignore[no-untyped-def]
    """Rules and fallbacks that a recipe itself holds, in its scopes and stages too."""
    parts = [recipe, *recipe.stages, *(s.recipe for r in (recipe, *recipe.stages) for s in r.scopes)]
    return sum(len(p.rules) + (p.fallback is not None) for p in parts)
