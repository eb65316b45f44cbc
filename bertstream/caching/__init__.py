"""Keys of texts in, rows of vectors out; what is missing is computed once.

Read in this order: codec (bytes of a row) -> memory, disk (the two tiers) -> store -> cache.
"""
