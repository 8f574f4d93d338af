"""The demo: a real transfer on data that ships with the package, step by step."""
