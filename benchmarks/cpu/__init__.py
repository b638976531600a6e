"""Experts on this machine's CPU beside those of other libraries: ``python benchmarks/cpu``."""
