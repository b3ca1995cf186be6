"""Models, data and servers that several tests use."""
