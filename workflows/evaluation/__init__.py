"""Quality, latency, memory and money, measured."""
