"""One folder an op: the reference, the kernels, and the glue that makes them one public function."""
