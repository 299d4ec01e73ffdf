"""Ops over values per token or per completion."""
