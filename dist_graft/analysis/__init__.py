"""What is asked of a run afterwards: how good its networks are, what their filters hold."""
