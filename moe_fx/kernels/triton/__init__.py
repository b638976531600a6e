"""Device code in Triton.  Importing a module of this folder imports triton: experts classes do it at their first call.

    sorting      which rows are whose, without a word to the host
    operands     what kernels are given: rows, matrices, vectors and the routing
    products     rows times their expert's matrix: the up products with the activation, the down product
    routing      the router: logits to ids and weights
    reduction    the k results of a token become one row
    derivatives  what a backward multiplies besides
    activations  every activation of ``reference.activations``, and its derivative, on float32
    configs      tile sizes by device and rows of one expert; tiles: measured ones, by stopwatch
    launch       from a spec and views of the weights to the launches of a forward; gradients: of a backward

A kernel takes pointers, strides and constants only; ``launch`` knows what they mean.  Nothing waits for the device.
"""
