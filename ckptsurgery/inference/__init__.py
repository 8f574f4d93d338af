"""Floor 4: recipes that nobody had to write, and proof that two models agree.

`suggesting` infers a recipe from names and shapes, `equating` from values; `verifying` compares the outputs of two
models.
"""
