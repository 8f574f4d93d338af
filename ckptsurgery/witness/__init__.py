"""The witness: whether a model holds what a checkpoint says, whatever loaded it.

`expecting` plans what each tensor should be, `model_sink` compares the bytes, `causes` finds out what a wrong tensor
holds instead, `overlaps` which tensors share memory, `faults` turns that into diagnostics, `loaded` is the public call,
`watching` surrounds one load.
"""
