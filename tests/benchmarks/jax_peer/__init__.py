"""The same updates in JAX: as its users write them, and tuned by hand."""
