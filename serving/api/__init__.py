"""The HTTP application, an ASGI application that knows nothing of Ray.

`routes` puts the operations' routes behind the `gateway`, which checks `keys` and writes the
`access_log`; `openapi` describes the routes.
"""
