"""The one engine: `execute` carries steps out, from where their sources are to the sink that takes what they make."""
