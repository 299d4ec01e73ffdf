"""Other frameworks through these kernels: mapping of names, and the hooks that they offer. Imports none of them."""
