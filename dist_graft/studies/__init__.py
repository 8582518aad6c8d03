"""Comparisons of methods with their controls over several seeds (``dist-graft compare``)."""
