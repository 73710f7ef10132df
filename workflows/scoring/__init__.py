"""Importance of weights: Gram statistics and saliency. Plain torch."""
