"""The .terse file: lossless coding of tensors, and the container that holds them. The format is in docs/format.md."""
