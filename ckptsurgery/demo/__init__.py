"""The demo: a real transfer on data that ships with the package, told step by step."""
