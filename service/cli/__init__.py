"""The command line: click, and nothing else; `commands/` does the work."""
