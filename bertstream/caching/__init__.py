"""Keys of texts in, rows of vectors out; what is missing is computed once.

Read in this order: codec (a row as bytes) -> memory, folder -> disk (the two tiers) -> store (both, and their counts)
-> cached_encoder (look up, compute the rest) -> cache (what users hold).
"""
