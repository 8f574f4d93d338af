"""Sharded models: the one room that knows `DTensor`, wrappers of `torch.distributed` and process groups.

The rest of the house sees boxes (`ckptsurgery/boxes.py`): a rank of a sharded model holds one of each tensor.
"""
