"""Moving the tensors of one live model into another: two names, two layouts, two meshes, one recipe between them.

Each rank plans alike from headers and boxes (`routes.py`, `buckets.py`), and then the ranks exchange elements bucket by
bucket (`carrying.py`). `holdings.py` finds what a rank holds of either side, and `resharder.py` is the public face.
"""
