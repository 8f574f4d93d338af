"""Byte sources: files that are open, mapped and read by ranges, and the ways from there to other files and devices."""
