"""`--device cuda` of `benchmarks/attention`: the GPU's pools, contenders, clock and cases."""
