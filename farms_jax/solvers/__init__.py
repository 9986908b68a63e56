"""Eigenvalues of windows: on CPU (LAPACK, in threads), on an accelerator (batched), over the devices of a mesh."""
