"""Shards in, token batches out, in DataLoader workers that never touch an accelerator.

Read in this order: access, stall_watch, remote and files (bytes); shards, options, raw, lines, tar, parquet, rows,
records and pieces (records); lanes, bucket and window (batches); state; dataset.
"""
