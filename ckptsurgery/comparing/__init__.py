"""Two checkpoints held against each other: keys, shapes, dtypes, ties and values, in bounded memory.

`sides` and `made` give a checkpoint and a plan's result the same face, `numbers` measures how far two tensors are
apart, block by block, `diffing` assembles the result.
"""
