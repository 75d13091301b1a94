"""One pure function per loss: tensors in, tensors out."""
