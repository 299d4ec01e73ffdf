"""Results of the benchmarks: their rows, tables and charts."""
