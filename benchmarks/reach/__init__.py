"""Which of the most served models the cache serves, and how much it holds: from their shapes."""
