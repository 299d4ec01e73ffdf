"""Tokens and completions in Triton."""
