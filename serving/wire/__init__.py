"""Messages between client and server, with neither torch nor Ray.

`oip_messages` writes and reads the Open Inference Protocol, `codecs` its tensors; `bodies` are
models of all JSON bodies, `errors` are refusals.
"""
