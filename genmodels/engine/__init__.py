"""Loaded versions that answer requests: `loaded` holds one, `text` and `images` ask it. No HTTP, no processes."""
