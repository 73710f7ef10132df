"""Hardware profiles: memory, price, and their source."""
