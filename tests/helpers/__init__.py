"""Models, data, servers and launchers that several tests use."""
