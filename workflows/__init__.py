"""What happens to a model, from a dense checkpoint to a published smaller one."""
