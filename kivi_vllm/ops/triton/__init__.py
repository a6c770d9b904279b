"""The operators in Triton, for NVIDIA GPUs: `operators` is the entry, one module a kernel."""
