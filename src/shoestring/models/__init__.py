"""Model families (one a file) and checkpoints in and out."""
