"""`--device cuda` of `benchmarks/attention.py`: the GPU's pools, contenders, clock and cases."""
