"""What rounds of many networks will cost, before the machines are asked for."""
