"""The HTTP application: routes, the gateway before them, keys, OpenAPI."""
