"""A run at a glance, from its files alone: also while it goes on, and after it broke."""
