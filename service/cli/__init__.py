"""The command line: click and nothing else, one file a command or group.

`main` wires the commands together, `options` holds what several share. A command parses its
options, calls one function of `mimray.service.commands` and prints what it returns. Heavy imports
happen inside the commands, so that `--help` answers at once.
"""
