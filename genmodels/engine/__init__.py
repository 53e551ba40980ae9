"""Loaded models and their requests: `loader` and `model_cache`, `text` and `image`. No HTTP, no processes."""
