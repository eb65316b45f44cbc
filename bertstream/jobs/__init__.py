"""One pass over a corpus: shards in; files, numbers or a warm cache out.

Read in this order: inspection, embed with parts and writers, tokenize, warm, doctor; the command line calls them.
"""
