"""Kernels that are Python: of the `.alltoall` and `.ops` overloads, and of fused_deep_moe."""
