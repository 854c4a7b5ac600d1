"""Tensors and numbers in, tensors and numbers out: no modules, no models."""
