"""Pictures: reading them, and the windows they are cut into."""
