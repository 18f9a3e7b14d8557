"""Raw records on disk: their versioned schema, and append-only storage that survives a kill."""
