"""KIVI KV cache of 2 to 4 bits (arXiv 2402.02750) as an attention backend for vLLM."""

__version__ = "0.3.0"
