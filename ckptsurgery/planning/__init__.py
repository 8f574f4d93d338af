"""Rules meet headers: a recipe and specs become a plan of steps, checked in full before any data is read.

`expanding` dissolves scopes, `matching` finds keys by template, `joining` groups them, `solving` finds sizes, `layout`
turns axes into affine pieces, `steps` holds programs, `planner` puts it together, `plan` is what comes out.
"""
