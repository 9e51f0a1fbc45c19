#!/bin/sh
# What Ray starts as HAProxy (RAY_SERVE_HAPROXY_BINARY_PATH): the launcher, in an isolated Python.
exec "${MIMRAY_PYTHON:-python3}" -I "$(dirname "$0")/haproxy_launcher.py" "$@"
