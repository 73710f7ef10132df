"""Patterns, solvers and structured removal. Plain torch, tensors in and tensors out."""
