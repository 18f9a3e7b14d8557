"""Target models: where their weights come from, how they are run, and the cache they are run with."""
