"""The command line `kivi-vllm`."""
