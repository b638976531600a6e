"""Kernels: pure tensor functions behind one registry.  Nothing here knows graphs, plans' reasons or torch.fx."""
