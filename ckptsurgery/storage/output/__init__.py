"""Output that appears whole or not at all: staging, transactions, and a writer for each format."""
