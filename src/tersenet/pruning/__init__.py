"""Methods that take weights, channels or blocks away."""
