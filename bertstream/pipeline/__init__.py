"""A source of batches in, the same batches with embeddings out.

Read epoch first: it composes source, groups, lockstep and encode. Then steps (epochs of N batches), fields, coalesce
and collate; clocks, stats and loader_stats; trainers (what Lightning and Hugging Face do to a loader).
"""
