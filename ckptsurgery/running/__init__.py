"""Plans are carried out here: streamed to files, gathered into a state_dict, put into a model; with a ledger.

`executing` runs the program of one step on tensors, `copying` moves bytes between files, `execution`
checkpoints, `loading` fills models, `proving` compares what must be equal, `report` keeps the ledger, `plan` offers it
to the caller.
"""
