"""What a model can be asked, one file an operation, and what they read and write."""
