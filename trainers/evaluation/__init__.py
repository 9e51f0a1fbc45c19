"""What a frozen encoder is worth, measured by probes."""
