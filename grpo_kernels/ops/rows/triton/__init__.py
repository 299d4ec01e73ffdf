"""Rows of logits in Triton."""
