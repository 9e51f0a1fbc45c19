"""Frozen encoders behind HTTP: an endpoint on Ray Serve, and its clients.

Imports run one way; `make imports` holds the order:

    deploy                   from serve.yaml to replicas behind HAProxy
    api                      the HTTP application: routes and the gateway before them
    operations               the things a model can be asked
    telemetry  inference     metrics and spans; pictures in, features out
    config     wire          serve.yaml as values; the messages that client and server share

`client` imports `wire` alone. `page` holds the web page's files.
"""
