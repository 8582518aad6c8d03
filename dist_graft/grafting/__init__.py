"""The method itself: tensors in, tensors out. Nothing here communicates or touches files."""
