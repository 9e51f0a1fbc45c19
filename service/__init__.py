"""The front door: command line, settings, jobs, deployment, doctor and demo."""
