"""Named cases and assertions that tests and benchmarks share."""
