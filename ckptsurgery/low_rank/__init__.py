"""Low-rank adapters: read in their spellings, merged into a base, extracted from a difference, renamed."""
