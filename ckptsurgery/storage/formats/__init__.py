"""One file a format: how it is recognised, and where its tensors lie."""
