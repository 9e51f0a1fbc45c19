"""Secrets in the addresses of data and services, masked in what is shown and recorded."""

from __future__ import annotations

import re

# Not a port; a password may hold slashes, though they should be encoded.
_PASSWORD = re.compile(r"(://[^/\s:@]*):(?!\d+/)[^\s@]+@")
_SECRET_OPTION = re.compile(
    r"([?&][^=&\s]*(?:secret|token|password|signature|access_key)[^=&\s]*)=[^&\s'\")]+", re.I
)


def masked(text: str) -> str:
    """Mask the passwords and secret options of all addresses in a text.

    Args:
        text: a message, a command line or an address.

    Returns:
        The text with `***` in place of each.
    """
    return _SECRET_OPTION.sub(r"\1=***", _PASSWORD.sub(r"\1:***@", text))
