"""The parts of tools/gpu_check.py: one file a part, each run in a process of its own by `part.py`, and shared helpers.

A part's file has a function `run(settings, emit)`. It calls `emit(row, **figures)` as soon as it has a row, so that a
part that is cut off has reported what it had; a row that is emitted again replaces the earlier one.
"""
