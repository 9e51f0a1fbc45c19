"""Sweeps that come with the installation."""
