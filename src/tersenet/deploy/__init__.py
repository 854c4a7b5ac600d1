"""From a model to files, and back: export to each runtime, run, verify against PyTorch, measure, the .terse artifact."""
