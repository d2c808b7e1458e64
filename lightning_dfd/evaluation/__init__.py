"""Videos generated, measured and shown."""
