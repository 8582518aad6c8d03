"""Communication between the processes of a population; no other package communicates."""
