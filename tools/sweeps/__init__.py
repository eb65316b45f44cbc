"""Shared by `sweep_families.py` and `sweep_settings.py`: tiny models, tokenizers, and slow references to compare with.

Nothing here uses bertstream's own tokenizer, layers or pooling: a reference that shares code shares mistakes.
"""
