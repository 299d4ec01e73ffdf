"""Ops over what is one number a token or a completion."""
