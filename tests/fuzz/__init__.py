"""Fuzzer: random valid and damaged inputs. `make fuzz` runs it for ten minutes, `make test` for one.

A target is a function of a seed that raises an error if something is wrong. `python -m tests.fuzz losses 17` repeats
one case.
"""
