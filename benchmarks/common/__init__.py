"""What all benchmarks share: children, machine facts, pictures, runs of vLLM."""
