"""Webhooks: messages of Standard Webhooks 1.0 (standardwebhooks.com), signed and sent once.

Knows secrets, URLs, addresses and one HTTP request; not jobs, and not when to try again.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import h11

from sdrt.errors import SdrtError, UsageError
from sdrt.version import __version__

SECRET_VARIABLE = "SDRT_WEBHOOK_SECRET"
SECRET_PREFIX = "whsec_"
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64  # of the specification
MAX_SECRETS = 4
TIMEOUT_SECONDS, CONNECT_SECONDS = 15.0, 5.0  # of an attempt, of one address in it
DEFAULT_PORTS = {"http": 80, "https": 443}


class WebhookError(SdrtError):
    """A message that was not accepted; the text is safe to show to clients.

    Attributes:
        is_final: Whether the receiver wants no further message.
    """

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final


@dataclass(frozen=True, slots=True)
class WebhookSettings:
    """Where messages may go, and what signs them.

    Attributes:
        origins: `scheme://host:port` of receivers, as `parse_origin` returns them.
        secrets: Each signs every message, so that a receiver can change to the next.
        allow_private: Whether a receiver's address may be one of a private network.
    """

    origins: tuple[str, ...]
    secrets: tuple[bytes, ...] = field(repr=False)
    allow_private: bool = False


def parse_origin(text: str) -> str:
    """`scheme://host:port` of a URL without a path; raises UsageError."""
    parts = _split_url(text)
    if parts is None or parts.path not in ("", "/") or parts.query:
        raise UsageError(
            f"--webhook-origin {text!r}; expected scheme and host",
            hint="for example https://hooks.example.org or http://10.0.0.7:8080",
        )
    return _origin(parts)


def check_webhook_url(url: str, settings: WebhookSettings | None) -> None:
    """Raise UsageError for a URL that is none, or whose origin the operator has not allowed."""
    if settings is None:
        raise UsageError(
            "webhook: this server sends none", hint="start it with --webhook-origin ORIGIN"
        )
    parts = _split_url(url)
    if parts is None:
        raise UsageError("webhook: expected an http or https URL without user and fragment")
    if _origin(parts) not in settings.origins:
        raise UsageError(
            f"webhook: {_origin(parts)} is not allowed",
            hint="the operator allows it with --webhook-origin",
        )


def _split_url(url: str) -> SplitResult | None:
    """The parts of a URL of printable ASCII with a host; None for any other."""
    if not url.isascii() or not url.isprintable() or set(' \\<>"') & set(url):
        return None
    try:
        parts = urlsplit(url)
        usable = parts.port != 0
    except ValueError:
        return None
    usable = usable and parts.scheme in DEFAULT_PORTS and bool(parts.hostname)
    return parts if usable and "@" not in parts.netloc and "#" not in url else None


def _origin(parts: SplitResult) -> str:
    host = str(parts.hostname)
    name = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{name}:{_port(parts)}"


def _port(parts: SplitResult) -> int:
    return parts.port or DEFAULT_PORTS[parts.scheme]


def read_secrets(path: Path | None) -> tuple[bytes, ...]:
    """The secrets of a file, one a line, or of `SDRT_WEBHOOK_SECRET`.

    Raises:
        UsageError: There is none, or one is invalid. The text of a secret is never shown.
    """
    source = str(path) if path else SECRET_VARIABLE
    try:
        text = path.read_text("utf-8") if path else os.environ.get(SECRET_VARIABLE, "")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read webhook secrets from {path}") from error
    secrets = tuple(_parse_secret(word, source) for word in text.split())
    if not 1 <= len(secrets) <= MAX_SECRETS:
        raise UsageError(
            f"{source} has {len(secrets)} webhook secrets; expected 1 to {MAX_SECRETS}",
            hint=f"pass --webhook-secret FILE, or set {SECRET_VARIABLE}",
        )
    return secrets


def _parse_secret(text: str, source: str) -> bytes:
    try:
        secret = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    in_bounds = MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES
    if not text.startswith(SECRET_PREFIX) or not in_bounds:
        raise UsageError(
            f"{source} holds an invalid webhook secret",
            hint=f"expected {SECRET_PREFIX} and the base64 of {MIN_SECRET_BYTES} to "
            f"{MAX_SECRET_BYTES} random bytes",
        )
    return secret


def sign(secrets: Sequence[bytes], message_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`: HMAC-SHA256 of `id.timestamp.body` by every secret."""
    content = f"{message_id}.{timestamp}.".encode() + body
    digests = [hmac.new(secret, content, hashlib.sha256).digest() for secret in secrets]
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


async def send_message(settings: WebhookSettings, url: str, message_id: str, body: bytes) -> None:
    """POST a signed message. No redirect is followed and no proxy is used.

    Args:
        settings: Secrets and allowed receivers.
        url: One that `check_webhook_url` accepts.
        message_id: The same whenever this message is sent again.
        body: JSON.

    Raises:
        WebhookError: The receiver did not answer with 2xx in time, or may not be connected to.
    """
    check_webhook_url(url, settings)  # the operator may have changed what is allowed
    timestamp = int(time.time())
    headers = {
        "content-type": "application/json",
        "user-agent": f"sdrt/{__version__}",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(settings.secrets, message_id, timestamp, body),
    }
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            status = await _post(urlsplit(url), headers, body, settings.allow_private)
    except TimeoutError:
        raise WebhookError(f"no answer within {TIMEOUT_SECONDS:g} s") from None
    except ssl.SSLError as error:
        raise WebhookError("the certificate is invalid, or TLS failed") from error
    except (OSError, h11.ProtocolError) as error:
        raise WebhookError("the connection failed") from error
    if not 200 <= status < 300:
        raise WebhookError(f"the answer has status {status}", is_final=status == 410)


async def _post(
    parts: SplitResult, headers: Mapping[str, str], body: bytes, allow_private: bool
) -> int:
    """The status of the answer to one request; raises OSError, WebhookError, ProtocolError."""
    host, port = str(parts.hostname), _port(parts)
    addresses = await _resolve(host, port, allow_private)
    context = ssl.create_default_context() if parts.scheme == "https" else None
    reader, writer = await _connect(addresses, port, context, host)
    target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
    sent = {"host": parts.netloc, "content-length": str(len(body)), "connection": "close"}
    connection = h11.Connection(h11.CLIENT)
    request = h11.Request(method="POST", target=target, headers=list({**sent, **headers}.items()))
    try:
        for part in (request, h11.Data(body), h11.EndOfMessage()):
            writer.write(connection.send(part) or b"")
        await writer.drain()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(65_536))
            elif isinstance(event, h11.Response):
                return event.status_code
            elif isinstance(event, h11.ConnectionClosed):
                raise ConnectionError
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _connect(
    addresses: Sequence[str], port: int, context: ssl.SSLContext | None, host: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the first address that takes one; raises OSError. The names of the
    certificate are compared with the host.
    """
    failure: OSError = ConnectionError("no address")
    for address in addresses:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                return await asyncio.open_connection(
                    address, port, ssl=context, server_hostname=host if context else None
                )
        except ssl.SSLError:
            raise
        except OSError as error:
            failure = error
    raise failure


async def _resolve(host: str, port: int, allow_private: bool) -> list[str]:
    """The addresses to connect to; raises WebhookError for one of a private network, also where a
    public name resolves to it.
    """
    loop = asyncio.get_running_loop()
    entries = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in entries]
    if not allow_private and not all(map(_is_public, addresses)):
        raise WebhookError("the receiver's address is not public (--webhook-private)")
    return addresses


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None)
    own = mapped or parsed
    return own.is_global and not own.is_multicast
