"""`python -m service` is the `mimray` command."""

from mimray.service.cli.main import main

main()
