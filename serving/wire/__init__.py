"""Messages between client and server, with neither torch nor Ray.

`oip_messages` writes and reads the Open Inference Protocol, `codecs` its tensors; `errors` are
refusals.
"""
