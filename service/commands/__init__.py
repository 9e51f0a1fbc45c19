"""The work behind each command, one file a command."""
