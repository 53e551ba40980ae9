"""The processes of the platform: the only place that imports ray."""
