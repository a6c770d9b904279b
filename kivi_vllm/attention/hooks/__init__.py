"""All that reaches into vLLM."""
