"""`make gpu`: stages that check and time the kernels on a GPU, the most valuable first; see GPU.md."""
