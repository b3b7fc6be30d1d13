"""What each command does, between the words typed and the training."""
