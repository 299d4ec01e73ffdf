"""Ops from hidden states: logits exist a chunk at a time."""
