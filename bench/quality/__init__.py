"""What the embedded model segments, without and with feedback."""
