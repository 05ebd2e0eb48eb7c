"""Policies of one's own: any row-wise module, this engine against JAX as its users write it and torch eager."""
