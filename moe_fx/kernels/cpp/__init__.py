"""Experts in C++ for CPUs, compiled on the machine at the first use.

    toolchain  which compiler, for which instructions; source → a shared library in our cache, loaded by ctypes
    layer      what a call is given: tensors and a spec → the struct of layer.h
    source/    simd.h: a vector of the machine; activations.h; products.h: rows times matrices; rows.h: what forward.cpp
               and backward.cpp share

The library knows nothing of Python or PyTorch: it takes addresses.  Threads are OpenMP's,
by the runtime that PyTorch has loaded already.
"""
