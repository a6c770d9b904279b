"""Native kernels for CPUs: C++ in `csrc/`, loaded by `library`, called by `operators`."""
