"""From any checkpoint into any model in one call: find the tensors, align the names, decide, load.

`aligning` finds wrapper prefixes, `spelling` other names of the same thing, `authoring` makes a recipe of both,
`deciding` settles every key of both sides,
`handing` gives modules with hooks of their own what is theirs, `loading` is the call.
"""
