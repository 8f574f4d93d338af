"""Where a checkpoint can be: a file, a folder, the hub, or several of them under prefixes."""
