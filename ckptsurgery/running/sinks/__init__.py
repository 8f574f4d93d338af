"""Where what is made can go besides files: tensors, models, and a comparison."""
