"""KIVI 2-bit KV cache (arXiv 2402.02750) as an attention backend for vLLM."""

__version__ = "0.2.0"
