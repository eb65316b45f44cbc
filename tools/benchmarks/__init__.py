"""The benchmarks of tools/bench.py: a file for each verb, which holds a function of its name, and what they share.

A verb's function takes the parsed arguments and returns what its JSON line says; `add_options`, where a file has one,
adds the options that are the verb's own. A new verb is a new file.
"""
