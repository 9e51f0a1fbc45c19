"""Run `python -m service` as the `mimray` command."""

from mimray.service.cli.main import main

main()
