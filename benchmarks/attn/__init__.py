"""What `benchmarks/attention.py` is made of: cases, pools, both sides' calls, timing, tables."""
