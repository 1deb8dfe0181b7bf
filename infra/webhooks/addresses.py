"""Where webhooks may go. A name is looked up once, every address is judged, and the judged address is connected to.

A receiver's URL comes from a user, and the request is made from inside our network: without these rules it could ask
the cloud's metadata service, the database or the loopback interface (server-side request forgery). Looking a name up
again when connecting would let its owner answer differently the second time (DNS rebinding).
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import httpx

from infra.errors import SettingsError, WebhookForbidden

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Returns the addresses of a host name."""

_MAX_URL = 1000
_PUBLIC_PORTS = (443, 8443)

# Python's own is_global has let several of these through, and it differs between patch releases.
_SPECIAL_V4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",  # carrier-grade NAT; some clouds keep their metadata service here
            "127.0.0.0/8",
            "168.63.129.16/32",  # Azure's platform services, on a public address
            "169.254.0.0/16",  # link-local, and the metadata service of most clouds
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.31.196.0/24",
            "192.52.193.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "192.175.48.0/24",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/3",  # multicast, reserved, broadcast
        ),
    )
)
_GLOBAL_V6 = IPv6Network("2000::/3")
"""The only part of IPv6 that is given out; outside lie loopback, ULA, link-local, mapped and translated IPv4."""
_SPECIAL_V6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # protocol assignments, among them Teredo, which carries IPv4
            "2001:db8::/32",
            "2002::/16",  # 6to4 carries IPv4
            "3fff::/20",
        ),
    )
)


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet's and of nothing nearer.

    >>> is_public(ip_address("93.184.215.14")), is_public(ip_address("::ffff:169.254.169.254"))
    (True, False)
    """
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _SPECIAL_V4)
    return address in _GLOBAL_V6 and not any(address in network for network in _SPECIAL_V6)


class AddressPolicy:
    """Decides about URLs and addresses: public ones over https, and networks that the operator opens over http too."""

    def __init__(self, networks: Iterable[str] = ()) -> None:
        try:
            self._networks: tuple[Network, ...] = tuple(ip_network(each) for each in networks)
        except ValueError as error:
            raise SettingsError(f"bad settings: DUQUANT_WEBHOOK_NETWORKS: {error}") from error

    def check_url(self, text: str) -> httpx.URL:
        """Return the URL that a user gave, read by the parser that will also send to it.

        Raises:
            WebhookForbidden: it is no plain URL of a web server, or plainly names a place inside.
        """
        if len(text) > _MAX_URL or not text.isascii() or not text.isprintable() or any(char in text for char in ' \\"'):
            raise WebhookForbidden(f"a webhook's URL is at most {_MAX_URL} plain characters without spaces")
        try:
            url = httpx.URL(text)
        except httpx.InvalidURL as error:
            raise WebhookForbidden(f"this is no URL: {error}") from error
        if url.scheme not in ("https", "http") or not url.host:
            raise WebhookForbidden("a webhook's URL looks like https://example.com/path")
        if url.userinfo or "#" in text:
            raise WebhookForbidden("a webhook's URL has neither a user name nor a fragment")
        literal = _literal(url.host)
        if literal is None:
            # What a name leads to is judged at every delivery, when it matters.
            self._check_port(url, is_open=bool(self._networks))
        else:
            self.check_address(url, literal)
        return url

    def check_address(self, url: httpx.URL, address: Address) -> None:
        """Raise WebhookForbidden unless this URL may be asked at this address."""
        is_open = any(address in network for network in self._networks)
        if not is_open and not is_public(address):
            raise WebhookForbidden("the receiver has no public address")
        self._check_port(url, is_open=is_open)

    def _check_port(self, url: httpx.URL, *, is_open: bool) -> None:
        if is_open:
            return
        if url.scheme != "https":
            raise WebhookForbidden("a webhook's URL must use https")
        if (url.port or 443) not in _PUBLIC_PORTS:
            raise WebhookForbidden(f"a webhook's port must be one of {', '.join(map(str, _PUBLIC_PORTS))}")

    async def addresses(self, url: httpx.URL, resolve: Resolver) -> list[str]:
        """Look the host up, once, and return its addresses.

        Raises:
            WebhookForbidden: it has none, or one of them may not be asked: a mixture is a trick, not a mistake.
        """
        literal = _literal(url.host)
        if literal is not None:
            found = [literal]
        else:
            port = url.port or (443 if url.scheme == "https" else 80)
            found = [ip_address(each) for each in await resolve(url.host, port)]
        if not found:
            # The same words as for a private address: the answer must not map the names of our network.
            raise WebhookForbidden("the receiver has no public address")
        for address in found:
            self.check_address(url, address)
        return [str(address) for address in dict.fromkeys(found)]


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host.strip("[]"))
    except ValueError:
        return None


async def look_up(host: str, port: int) -> list[str]:
    """Return the addresses of a host by the system's resolver; none when there are none."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    # A scope such as %eth0 names a link-local address, which is refused anyway.
    return [str(entry[4][0]).partition("%")[0] for entry in found]


class GuardedTransport(httpx.AsyncBaseTransport):
    """Connects to the very addresses that the policy has judged, and still checks the certificate of the name."""

    def __init__(
        self,
        policy: AddressPolicy,
        *,
        verify: bool | object = True,
        resolve: Resolver = look_up,
    ) -> None:
        self._policy = policy
        self._resolve = resolve
        self._verify = verify

    @cached_property
    def _inner(self) -> httpx.AsyncHTTPTransport:
        """The transport behind. Made when there is something to send: reading the certificates takes a while."""
        # Connections are pooled by address: keeping one would lend it to another name on the same address.
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.AsyncHTTPTransport(verify=self._verify, limits=limits, trust_env=False)  # type: ignore[arg-type]  # an SSLContext

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request to the first judged address that accepts a connection.

        Raises:
            WebhookForbidden: the policy refuses.
            httpx.TransportError: the receiver does not answer.
        """
        name = request.url.host
        addresses = await self._policy.addresses(request.url, self._resolve)
        request.extensions = {**request.extensions, "sni_hostname": name}
        for address in addresses[:-1]:
            try:
                return await self._send(request, address)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await self._send(request, addresses[-1])

    async def _send(self, request: httpx.Request, address: str) -> httpx.Response:
        # The Host header was written when the request was built and keeps the name.
        pinned = httpx.Request(
            request.method,
            request.url.copy_with(host=address),
            headers=request.headers,
            stream=request.stream,
            extensions=request.extensions,
        )
        return await self._inner.handle_async_request(pinned)

    async def aclose(self) -> None:
        """Close the connections."""
        if "_inner" in vars(self):
            await self._inner.aclose()
