"""The zoo: tiny random models of the 75 mixture-of-experts families of transformers.

families.py is the catalogue, samples.py builds the models, capture_table.py says which of them Dynamo captures whole.
"""

from .families import FAMILIES, IMPLEMENTATIONS, Family
from .samples import Sample, available, blocks_run, build, experts_modules, moe_matters, relative_error, unavailable

__all__ = [
    "FAMILIES",
    "IMPLEMENTATIONS",
    "Family",
    "Sample",
    "available",
    "blocks_run",
    "build",
    "experts_modules",
    "moe_matters",
    "relative_error",
    "unavailable",
]
