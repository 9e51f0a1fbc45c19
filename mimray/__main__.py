"""Run `python -m mimray` as the `mimray` command."""

from mimray.service.cli.main import main

main()
