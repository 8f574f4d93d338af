"""Ops between quantised weights and floats.

Every format is made of three ideas. `code_books`: integers are unpacked from bytes or words, and a code book gives each
its value. `scales`: each value, less a zero point, is multiplied by the scale of its group, block, row or tensor.
`bands`: the result is made some rows at a time in float32, and each row is rounded once.
"""
