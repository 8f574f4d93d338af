"""What concerns a live model: selections, ties, initialisation, freezing, skeletons, summaries. No files here.

`places` says where the tensors live, `matching` which ones a word means; `selection`, `ties`, `initialising`, `groups`,
`skeletons` and `summary` hold what the facade shows; `assigning` and `facts` are what a load is made of.
"""
