"""Ops over rows of logits."""
