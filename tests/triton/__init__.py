"""The Triton kernels, on a GPU if there is one, and interpreted otherwise.

Interpreted, they need TRITON_INTERPRET=1 before Triton is imported: a run of their own,
`TRITON_INTERPRET=1 pytest tests/triton`, which `make test` makes.
"""
