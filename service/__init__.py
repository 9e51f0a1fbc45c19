"""The `mimray` command, on top of everything else.

In order: `cli` parses options, `commands` do the work, `terminal` shows it, `cluster` connects to
Ray.
"""
