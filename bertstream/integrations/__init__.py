"""Other people's engines with bertstream inside; each file needs the engine's own extra."""
