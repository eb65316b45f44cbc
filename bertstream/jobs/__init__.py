"""Shards in, files, numbers or a warm cache out: one pass over a corpus.

Read in this order: inspection, embed with writers, warm, doctor; the command line calls them.
"""
