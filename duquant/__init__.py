"""The algorithm library: tensors in, tensors out. Importing it loads nothing else."""
