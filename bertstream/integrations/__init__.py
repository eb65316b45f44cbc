"""bertstream inside other engines; each file needs its engine's extra."""
