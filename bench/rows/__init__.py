"""What is compared: problems, and several ways of solving each."""
