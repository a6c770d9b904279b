"""What a quantized cache costs in quality: perplexity, divergence, retrieval, generation, tasks."""
