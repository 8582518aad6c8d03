"""One round: agreement, exchange, blending, record."""
