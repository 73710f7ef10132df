"""What the target runtime loads."""
