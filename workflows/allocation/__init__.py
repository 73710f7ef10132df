"""Allocation of sparsity: which share of each linear goes. Plain numpy."""
