"""Training: `Train`, and `Recover` for people who bring their own loop."""

from tersenet.train.train import Recover, Train

__all__ = ["Recover", "Train"]
