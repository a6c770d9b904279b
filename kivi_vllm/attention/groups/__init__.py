"""The cache groups: one a file, its spec beside its manager."""
