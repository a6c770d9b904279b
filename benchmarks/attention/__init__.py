"""What `benchmarks/attention` is made of: cases, pools, both sides' calls, timing, tables."""
