"""Config, run directory, manifest, ledger, shared nouns, errors, progress. Loads no torch."""
