"""Shards in, token batches out, in DataLoader workers that never touch an accelerator.

Read in this order: access, faults, remote and files (bytes); shards, then lines, tar, arrow, parquet, tables and rows
(formats); options, record_columns, records and pieces (records); lanes, mixture, bucket, bucket_records, batch_fields
and lane_batches (batches);
layout (who reads what) and counts (how much); bad_records, state, saved_settings and
stream_settings (how far); dataset, and messages (from workers).
"""
