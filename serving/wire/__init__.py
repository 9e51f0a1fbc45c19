"""What client and server share: tensors, messages, errors; neither torch nor Ray."""
