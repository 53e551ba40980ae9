"""Arithmetic of evaluations that families share: distances between sets of pictures, their judge, and baselines."""
