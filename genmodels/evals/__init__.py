"""Evaluation of trained models: metrics of images and texts, a feature classifier, and baselines."""
