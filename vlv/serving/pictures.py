"""The bytes of an image that a client names: in a `data:` URL, or on a public host. Nothing else is opened."""

import asyncio
import base64
import binascii
import ipaddress
import socket
from typing import Any

import httpx
from safehttpx import AsyncSecureTransport

MEGABYTE = 1_000_000


class TooLarge(ValueError):
    """An image over the limit."""


async def fetch(url: Any, largest: int) -> bytes:
    """
    The bytes of an image.

    Args:
        url: `data:...;base64,...`, or an http(s) URL on a public host. A path, another scheme, and a host of the
            server's own network are refused: a client must not see through the server what it cannot see itself.
        largest: bytes that an image may have.

    Raises:
        TooLarge: it has more.
        ValueError: it is refused, or cannot be fetched; the sentence says why.
    """
    scheme = url[:5].lower() if isinstance(url, str) else ""
    if scheme == "data:":
        return _decode(url, largest)
    if scheme.startswith("http"):
        return await _download(url, largest)
    raise ValueError("The image's url must begin with data:, https:// or http://; no files of the server are read.")


def _decode(url, largest):
    header, comma, data = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ValueError("The image's data: URL must have the form data:image/png;base64,... .")
    if len(data) * 3 // 4 > largest + 3:
        raise too_large(largest)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("The image's data: URL is not valid base64.") from None


async def _download(url, largest):
    try:
        host = httpx.URL(url).host
        transport = AsyncSecureTransport(await _public_address(host))
        async with httpx.AsyncClient(transport=transport) as client, client.stream("GET", url) as response:
            if response.status_code != httpx.codes.OK:  # a redirect is not followed: it may lead inside
                raise ValueError(f"{_name(url)} answers with status {response.status_code} and not with an image.")
            content = bytearray()
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > largest:
                    raise too_large(largest)
            return bytes(content)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{_name(url)} cannot be fetched ({reason}).") from None


async def _public_address(host):
    """An address of the host, to which the connection is then made: a second look-up could give another one."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    addresses = [address[0] for *_, address in found]
    if not addresses or not all(map(is_public, addresses)):
        raise ValueError(f"{host or 'This host'} is not a public host: send the image in a data: URL.")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, and not of this machine or its network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not ip.is_multicast


def too_large(largest: int) -> TooLarge:
    return TooLarge(f"The image is larger than {largest / MEGABYTE:g} MB, the most that this server takes.")


def _name(url):
    return url if len(url) <= 200 else f"{url[:200]}…"
