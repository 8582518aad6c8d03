"""Population methods: one module per rule."""
