"""Generative models from one YAML to a live endpoint; importing this loads neither torch nor ray."""

__version__ = "0.1.0"
