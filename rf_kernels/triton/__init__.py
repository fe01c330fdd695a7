"""The four ops in Triton: one readable source an op, for GPUs that have no kernels written by hand
(docs/triton.md)."""
