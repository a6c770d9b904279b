"""The vLLM side: backend, cache groups, and what differs between vLLM versions."""
