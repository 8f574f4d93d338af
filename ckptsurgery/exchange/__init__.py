"""Recipes and the mappings of other frameworks: read from theirs, written as theirs, traced from their code."""
