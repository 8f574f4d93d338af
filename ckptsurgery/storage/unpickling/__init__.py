"""Pickles read without running anything of them: inert records, and which of them are tensors of a model."""
