"""The typed public functions, one module per op."""
