"""Where webhooks may go: the tricks of server-side request forgery, one by one."""

import asyncio
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any

import httpx
import pytest
import trustme

from infra.errors import SettingsError, WebhookForbidden
from infra.webhooks.addresses import AddressPolicy, GuardedTransport, is_public, look_up

PRIVATE = [
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "0.1.2.3",
    "10.1.2.3",
    "100.100.100.200",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.168.1.1",
    "198.18.0.1",
    "203.0.113.7",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "3fff::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize("text", PRIVATE)
def test_addresses_inside_are_not_public(text: str) -> None:
    assert not is_public(ip_address(text))
    host = f"[{text}]" if ":" in text else text
    with pytest.raises(WebhookForbidden, match="no public address"):
        AddressPolicy().check_url(f"https://{host}/hook")


@pytest.mark.parametrize("text", ["1.1.1.1", "93.184.215.14", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"])
def test_addresses_of_the_internet_are_public(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "https://",
        "https:///path",
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "javascript:alert(1)",
        "http://example.com/",
        "https://user@example.com/",
        "https://user:password@example.com/",
        "https://example.com@127.0.0.1/",
        "https://example.com/#fragment",
        "https://example.com:22/",
        "https://example.com:99999/",
        "https://example.com\\@127.0.0.1/",
        "https://exa mple.com/",
        "https://example.com/\r\nX-Evil: 1",
        "https://example.com/\0",
        "https://ex\u00e4mple.com/",
        "https://[::1/",
        "https://example.com/" + "a" * 1000,
    ],
)
def test_what_is_no_plain_https_url_is_refused(url: str) -> None:
    with pytest.raises(WebhookForbidden):
        AddressPolicy().check_url(url)


@pytest.mark.parametrize(
    "host", ["localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]", "[::ffff:7f00:1]", "0"]
)
def test_every_way_to_write_loopback_is_refused_at_the_latest_when_it_is_looked_up(host: str) -> None:
    async def send() -> None:
        policy = AddressPolicy()
        url = policy.check_url(f"https://{host}/")
        await policy.addresses(url, look_up)

    with pytest.raises(WebhookForbidden):
        asyncio.run(send())


def test_one_bad_address_among_good_ones_spoils_the_name() -> None:
    async def resolve(_host: str, _port: int) -> list[str]:
        return ["93.184.215.14", "10.0.0.1"]

    with pytest.raises(WebhookForbidden):
        asyncio.run(AddressPolicy().addresses(httpx.URL("https://example.com/"), resolve))


def test_a_name_without_addresses_is_refused_in_the_same_words() -> None:
    async def resolve(_host: str, _port: int) -> list[str]:
        return []

    with pytest.raises(WebhookForbidden, match="no public address"):
        asyncio.run(AddressPolicy().addresses(httpx.URL("https://example.com/"), resolve))


def test_the_operator_can_open_a_network_and_no_more() -> None:
    policy = AddressPolicy(["10.1.0.0/16", "fd12::/16"])
    for good in ("http://10.1.2.3:8080/", "https://[fd12::1]/", "http://hooks.internal:9000/"):
        policy.check_url(good)
    for bad in ("http://10.2.0.1/", "https://10.2.0.1/", "https://127.0.0.1/", "http://93.184.215.14/"):
        with pytest.raises(WebhookForbidden):
            policy.check_url(bad)

    async def resolve(_host: str, _port: int) -> list[str]:
        return ["93.184.215.14"]

    # A name is let in because it may lead to the open network; when it leads elsewhere, https is needed after all.
    with pytest.raises(WebhookForbidden, match="https"):
        asyncio.run(policy.addresses(httpx.URL("http://hooks.internal:9000/"), resolve))


def test_a_misspelt_network_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match="DUQUANT_WEBHOOK_NETWORKS"):
        AddressPolicy(["10.0.0.1/8"])


class Receiver(ThreadingHTTPServer):
    """A real TLS server on loopback whose certificate is for hooks.example.test."""

    def __init__(self, authority: trustme.CA) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str]] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("hooks.example.test").configure_cert(context)
        self.socket = context.wrap_socket(self.socket, server_side=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.seen.append((self.headers["Host"], self.path))
        self.send_response(302)
        self.send_header("Location", "https://127.0.0.1:1/inside")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class's name
        pass


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def receiver(authority: trustme.CA) -> Iterator[Receiver]:
    with Receiver(authority) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def post(authority: trustme.CA, url: str, addresses: list[list[str]]) -> int:
    """Post through the guard; each look-up of a name gives the next list of addresses."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    answers = iter(addresses)

    async def resolve(_host: str, _port: int) -> list[str]:
        return next(answers)

    async def send() -> int:
        transport = GuardedTransport(AddressPolicy(["127.0.0.0/8"]), verify=context, resolve=resolve)
        async with httpx.AsyncClient(transport=transport, follow_redirects=False) as client:
            return (await client.post(url, content=b"{}")).status_code

    return asyncio.run(send())


def test_the_name_is_looked_up_once_and_what_was_judged_is_connected_to(
    receiver: Receiver, authority: trustme.CA
) -> None:
    # A second look-up, as in DNS rebinding, would raise StopIteration here.
    url = f"https://hooks.example.test:{receiver.server_port}/a?b=c"
    assert post(authority, url, [["127.0.0.1"]]) == 302
    assert receiver.seen == [(f"hooks.example.test:{receiver.server_port}", "/a?b=c")]


def test_the_certificate_must_be_the_names_although_the_address_is_dialled(
    receiver: Receiver, authority: trustme.CA
) -> None:
    with pytest.raises(httpx.ConnectError, match=r"(?i)hostname mismatch"):
        post(authority, f"https://other.example.test:{receiver.server_port}/", [["127.0.0.1"]])
    assert receiver.seen == []


def test_the_next_address_is_tried_when_one_does_not_answer(receiver: Receiver, authority: trustme.CA) -> None:
    url = f"https://hooks.example.test:{receiver.server_port}/"
    assert post(authority, url, [["127.0.0.3", "127.0.0.1"]]) == 302
