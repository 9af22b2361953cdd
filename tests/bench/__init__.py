"""Benchmarks: the runtime beside the SDK's own servers, in one run on the same Python. `run.py` is the command."""
