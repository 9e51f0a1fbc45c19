"""`python -m service` is the `mimray` command."""

from service.cli import main

main()
