"""The mapping language: text to objects and back. No torch, no files, no tensors here.

`keys` holds key patterns, `axes` the axis lists, `rules` one line of a recipe, `dims` the expressions over a config,
`recipe` the whole and its algebra, `toml` its text, `calls` ops and initialisers by name, `folding` keys for the eye.
"""
