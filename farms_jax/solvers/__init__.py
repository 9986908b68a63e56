"""Eigenvalues of windows: on CPU (LAPACK, in threads), on accelerators (batched), over the devices of a mesh."""
