"""Prometheus metrics and OpenTelemetry spans; neither knows of the other."""
