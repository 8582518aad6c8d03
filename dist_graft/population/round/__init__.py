"""Parts of a round: agreement, exchange, application of the mixing, record."""
