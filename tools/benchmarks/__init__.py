"""The benchmarks of tools/bench.py: one file a verb, and the files they share.

A verb's file has a function of its name, which takes the parsed arguments and returns the content of the JSON line; an
optional `add_options` adds the verb's own options. To add a verb, add a file.
"""
