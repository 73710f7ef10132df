"""Masked, distilled, sharded fine-tuning."""
