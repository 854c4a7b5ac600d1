"""From a model to files: export to each runtime, run, verify against PyTorch, measure, and the .terse artifact."""
