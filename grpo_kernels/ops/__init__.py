"""The ops, by their inputs: tokens, rows of logits, or a head. A folder holds references, kernels and public ops."""
