"""The machine: devices, threads, processes, ranks.

Read in this order: cuda, threads, process, distributed; each stands alone.
"""
