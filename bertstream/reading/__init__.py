"""Shards in, token batches out, in DataLoader workers that never touch an accelerator.

Read in this order: access, remote and files (bytes); shards, records and pieces (records); lanes, bucket and window
(batches); state; dataset.
"""
