"""Pictures in request bodies: raw, multipart, and JSON with data URIs, base64 or URLs."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any

from mimray.serving.config import Urls
from mimray.serving.operations.calls import Call
from mimray.serving.operations.fetching import fetch
from mimray.serving.wire.errors import InvalidRequestError, TooLargeError, UnsupportedMediaTypeError

_STANDARD = str.maketrans("-_", "+/", "\r\n")


async def read_pictures(call: Call, urls: Urls, *, max_pictures: int) -> list[bytes]:
    """Read the encoded pictures of a request.

    Args:
        call: the request; its body is a picture, a form with files, or JSON `{"images": […]}`.
        urls: the rules for pictures by URL.
        max_pictures: most pictures of one request.

    Raises:
        UnsupportedMediaTypeError: a Content-Type of another kind.
        InvalidRequestError: there is none, or the body is not what it says it is.
        TooLargeError: there are too many.
    """
    content_type = call.headers.get("content-type", "")
    media = content_type.partition(";")[0].strip().lower()
    if media == "multipart/form-data":
        pictures: Sequence[str | bytes] = _form_files(call.body, content_type)
    elif media == "application/json":
        pictures = _listed(parse_object(call.body).get("images"), "images")
    elif media in ("", "application/octet-stream", "application/x-www-form-urlencoded"):
        # The last is what curl says of any body unless it is told otherwise.
        pictures = [call.body] if call.body else []
    elif media.startswith("image/"):
        pictures = [call.body] if call.body else []
    else:
        raise UnsupportedMediaTypeError(
            f"a body of {media[:60]!r} is not taken",
            hint="send a picture, multipart/form-data with files, or application/json",
        )
    return await decoded_pictures(pictures, urls, max_pictures=max_pictures)


async def decoded_pictures(
    pictures: Sequence[str | bytes], urls: Urls, *, max_pictures: int
) -> list[bytes]:
    """Decode pictures to bytes.

    Args:
        pictures: the pictures; text is a data URI, base64 or a URL.
        urls: the rules for pictures by URL.
        max_pictures: most pictures of one request.

    Raises:
        InvalidRequestError: there is none, or text that is none of these.
        TooLargeError: there are too many.
    """
    if not pictures:
        raise InvalidRequestError(
            "the request holds no picture", hint="send one as the body, or files in a form"
        )
    if len(pictures) > max_pictures:
        raise TooLargeError(
            f"{len(pictures)} pictures in one request, at most {max_pictures} are taken",
            hint="send several requests",
        )

    async def one(picture: str | bytes, index: int) -> bytes:
        if isinstance(picture, bytes):
            return picture
        if picture[:8].lower().startswith(("http://", "https://")):
            return await fetch(picture, urls)
        return _from_text(picture, index)

    # One after the other: together they could fill the memory, and URLs are the rare way.
    return [await one(picture, index) for index, picture in enumerate(pictures)]


def parse_object(body: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InvalidRequestError: it is something else.
    """
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not JSON: {str(error)[:100]}") from error
    if not isinstance(tree, dict):
        raise InvalidRequestError("the body is JSON, but no object")
    return tree


def _listed(value: Any, name: str) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise InvalidRequestError(
            f"`{name}` must be a list of text", hint="data URIs, base64 or https URLs"
        )
    return values


def _from_text(text: str, index: int) -> bytes:
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InvalidRequestError(
                f"picture {index} is a data URI that is not base64",
                hint="data:image/jpeg;base64,…",
            )
    # With line breaks, in URLs' alphabet or without padding, as encoders write it.
    text = text.translate(_STANDARD).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(
            f"picture {index} is neither a data URI nor base64: {error}"
        ) from error


def _form_files(body: bytes, content_type: str) -> list[bytes]:
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import create_form_parser

    files: list[bytes] = []

    def on_file(file: Any) -> None:
        file.file_object.seek(0)
        files.append(file.file_object.read())
        file.close()

    try:
        parser = create_form_parser(
            {"Content-Type": content_type.encode()},
            lambda field: None,
            on_file,
            # The body is in memory already.
            config={"MAX_MEMORY_FILE_SIZE": len(body) + 1},
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequestError(f"the form cannot be read: {error}") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise InvalidRequestError("the form cannot be read") from error
    return files
