"""Model families: which tensors of which architecture are experts."""
