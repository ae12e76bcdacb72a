"""One folder per operator: its page and public function, reference, schema with autograd, adapters to kernels."""
