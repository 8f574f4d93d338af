"""A storage reader and a storage writer for `torch.distributed.checkpoint`, each with a recipe in it.

Their modules import torch, since they derive from its classes; the package does not import them before they are used.
"""
