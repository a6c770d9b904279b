"""The evaluations that KIVI and Quest publish: GSM8K, passkey, LongBench, PG-19."""
