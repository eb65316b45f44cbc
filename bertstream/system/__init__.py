"""The machine: devices, threads, processes, ranks.

Read in any order: cuda, threads, process, distributed.
"""
