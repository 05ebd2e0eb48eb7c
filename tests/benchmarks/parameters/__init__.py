"""Gradients of physical parameters, beside those of a controller's weights."""
