"""The endpoint on Ray Serve, from its configuration to its replicas.

`endpoint` starts and ends it, with `haproxy` before it; `rollout` replaces versions; `serve_schema`
writes Ray Serve's configuration, which carries `settings` to the `replicas`; `build_service` builds
what a replica answers with. `haproxy_launcher` runs by itself, in HAProxy's place.
"""
