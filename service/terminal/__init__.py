"""Progress and tables for people at a terminal.

`console` is standard error, `progress` shows how far work is, `phases` brings that over from other
processes; `sweep_table`, `forecast` and `guide` render what commands found.
"""
