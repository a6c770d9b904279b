"""A whole engine: throughput, and where its time goes."""
