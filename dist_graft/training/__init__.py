"""What happens between two rounds, and the story of a run."""
