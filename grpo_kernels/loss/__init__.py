"""What a loss is: its options, inputs, weights, reference and metrics. In torch, without kernels."""
