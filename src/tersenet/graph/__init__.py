"""A model as a graph: capture, costs, what must be cut together, and the cut itself."""
