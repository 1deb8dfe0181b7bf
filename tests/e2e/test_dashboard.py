"""The dashboard in a real browser, against the service as a process, a real database and a real S3 server."""

import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from client.home import load_secrets
from duquant.config import preset
from infra.artifact_keys import ArtifactKeys
from infra.database import make_engine
from infra.jobs import Claim, Job, JobStore, NewJob
from infra.storage import ObjectStore

pytestmark = pytest.mark.e2e

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LAYERS = 6


@dataclass
class Site:
    """A running service and what a dispatcher would hold."""

    url: str
    key: str
    jobs: JobStore
    storage: ObjectStore
    complaints: list[str] = field(default_factory=list)

    def enqueue(self, recipe: str = "duquant") -> Job:
        spec = {
            "kind": "quantize",
            "model": {"source": "demo", "name": "smollm2-135m", "revision": None},
            "model_identity": "demo:smollm2-135m",
            "recipe": preset(recipe).to_dict(),
        }
        new = NewJob(tenant_id="default", kind="quantize", spec=spec, fingerprint="f" * 64)
        return self.jobs.enqueue(new, force=True, actor="test")[0]

    def claim(self) -> Claim:
        claim = self.jobs.claim("dispatcher-1", lease_seconds=600)
        assert claim is not None
        return claim

    def start(self) -> Claim:
        claim = self.claim()
        self.jobs.plan(claim, [-1, *range(LAYERS)])
        return claim

    def do_layer(self, claim: Claim, layer: int) -> None:
        row = self.jobs.start_layer(claim, layer, "node-1")
        key = ArtifactKeys("default", claim.job.id).layer(layer, fence=row.fence, attempt=row.attempt)
        info = self.storage.put_bytes(key, random.Random(layer + 2).randbytes(1000))
        metrics = {} if layer < 0 else {"mlp_in": {"output_nmse": 0.01 * (layer + 1)}}
        self.jobs.commit_layer(
            claim, replace(row, key=key, sha256=info.sha256, size_bytes=info.size_bytes, metrics=metrics, seconds=1.5)
        )
        self.jobs.progress(claim, phase="layers", done=layer + 2, total=LAYERS + 1)

    def finish(self, claim: Claim) -> None:
        keys = ArtifactKeys("default", claim.job.id)
        files = [
            {"name": f"shard-{row.layer}.safetensors", "sha256": row.sha256, "size_bytes": 1000, "key": row.key}
            for row in self.jobs.layers(claim.job.id)
        ]
        self.storage.put_bytes(keys.manifest, json.dumps({"files": files, "evaluation": {}}).encode())
        artifact = {
            "manifest_key": keys.manifest,
            "size_bytes": sum(file["size_bytes"] for file in files),
            "summary": {},
        }
        self.jobs.complete(claim, {"artifact": artifact})


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    assert found is not None, "no Chromium on this machine; install one (Debian: apt-get install chromium)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def site(tmp_path: Path, migrated_sqlite_url: str, object_store: ObjectStore, s3: Any) -> Iterator[Site]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    secrets = load_secrets(tmp_path)
    settings = {
        "HOME": tmp_path,
        "DATABASE_URL": migrated_sqlite_url,
        "S3_ENDPOINT": s3.endpoint,
        "S3_BUCKET": object_store.bucket,
        "S3_ACCESS_KEY": s3.access_key,
        "S3_SECRET_KEY": s3.secret_key,
        "KEY_PEPPER": secrets.key_pepper,
        "BOOTSTRAP_KEY": secrets.api_key,
        "PORT": port,
    }
    env = {**os.environ, **{f"DUQUANT_{name}": str(value) for name, value in settings.items()}}
    log = (tmp_path / "service.log").open("w")
    process = subprocess.Popen([sys.executable, "-m", "service"], env=env, stderr=log)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while not _is_up(url):
        assert process.poll() is None, (tmp_path / "service.log").read_text()
        assert time.monotonic() < deadline, "the service did not start"
        time.sleep(0.1)
    engine = make_engine(migrated_sqlite_url)
    yield Site(url, secrets.api_key, JobStore(engine), object_store)
    engine.dispose()
    process.terminate()
    process.wait(20)
    log.close()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def open_page(browser: Browser, site: Site, *, width: int = 1200, scheme: Any = "light", script: bool = True) -> Page:
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=script
    )
    page = context.new_page()
    page.set_default_timeout(20_000)
    # A broken content policy or a script error shows up here and nowhere else.
    page.on("console", lambda message: site.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: site.complaints.append(str(error)))
    return page


def log_in(page: Page, site: Site) -> None:
    page.goto(site.url)
    page.get_by_label("API key").fill(site.key)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()


def test_a_wrong_key_is_refused_in_words_and_a_right_one_opens_the_queue(browser: Browser, site: Site) -> None:
    page = open_page(browser, site)
    page.goto(site.url)
    expect(page).to_have_url(f"{site.url}/login")
    page.get_by_label("API key").fill("dq_live_wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("not valid")
    log_in(page, site)
    expect(page.get_by_text("No jobs yet.")).to_be_visible()
    cookies = page.context.cookies()
    assert [(cookie["httpOnly"], cookie["sameSite"]) for cookie in cookies] == [(True, "Strict")]
    assert site.key not in str(cookies)
    page.get_by_role("button", name="Log out").click()
    page.goto(site.url)
    expect(page).to_have_url(f"{site.url}/login")


def test_the_queue_follows_the_jobs_without_a_reload(browser: Browser, site: Site) -> None:
    page = open_page(browser, site)
    log_in(page, site)
    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    site.enqueue()
    row = page.get_by_role("row").filter(has_text="smollm2-135m")
    expect(row).to_contain_text("queued")
    claim = site.start()
    site.do_layer(claim, -1)
    expect(row).to_contain_text("running")
    expect(row).to_contain_text("layers 1/7")
    site.jobs.fail(claim, "bad_input", "the text is too short")
    expect(row).to_contain_text("failed")
    page.get_by_role("navigation", name="Jobs by state").get_by_text("queued").click()
    expect(page.get_by_text("No job is queued.")).to_be_visible()
    assert site.complaints == []


def test_a_jobs_layers_are_seen_live_until_the_artifact_is_there(browser: Browser, site: Site) -> None:
    job = site.enqueue()
    page = open_page(browser, site)
    log_in(page, site)
    page.get_by_role("link", name="details").click()
    expect(page.get_by_text("The layers are planned when")).to_be_visible()
    claim = site.start()
    cells = page.get_by_role("listitem").filter(has=page.locator("b"))
    heat = page.locator("ol.heat > li")
    expect(heat).to_have_count(LAYERS + 1)
    for layer in range(-1, LAYERS):
        site.do_layer(claim, layer)
    expect(page.locator("ol.heat > li.layer-done")).to_have_count(LAYERS + 1)
    expect(heat.nth(LAYERS)).to_contain_text("0.06")
    by_error = [_color(page, n) for n in (1, LAYERS)]
    assert by_error[0] != by_error[1]  # the least and the largest error look different
    page.get_by_text("seconds", exact=True).click()
    expect(heat.nth(1)).to_contain_text("1.5 s")
    assert _color(page, 1) == _color(page, LAYERS)  # all took equally long
    page.get_by_text("As a table").click()
    table = page.get_by_role("table")
    expect(table.get_by_role("columnheader", name="mlp_in")).to_be_visible()
    site.finish(claim)
    expect(page.get_by_role("status").filter(has_text="succeeded")).to_be_visible()
    expect(page.get_by_text(f"duquant artifact pull {job.id}")).to_be_visible()
    expect(table.first).to_be_visible()  # what was open stays open
    expect(page.locator("#by-seconds")).to_be_checked()
    page.get_by_text("Files", exact=True).click()
    digest = hashlib.sha256(random.Random(2).randbytes(1000)).hexdigest()
    expect(page.get_by_text(digest)).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="shard-0.safetensors").click()
    assert hashlib.sha256(Path(download.value.path()).read_bytes()).hexdigest() == digest
    expect(cells.first).to_be_visible()
    assert site.complaints == []


def _color(page: Page, index: int) -> str:
    color: str = page.locator("ol.heat > li").nth(index).evaluate("cell => getComputedStyle(cell).backgroundColor")
    return color


def test_a_job_is_cancelled_by_its_button(browser: Browser, site: Site) -> None:
    job = site.enqueue()
    page = open_page(browser, site)
    log_in(page, site)
    page.goto(f"{site.url}/jobs/{job.id}")
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.get_by_role("status").filter(has_text="cancelled")).to_be_visible()
    expect(page.get_by_role("button", name="Cancel the job")).to_have_count(0)
    assert site.jobs.get(job.id).state == "cancelled"
    assert site.complaints == []


def test_forms_from_other_sites_are_refused(browser: Browser, site: Site) -> None:
    job = site.enqueue()
    with httpx.Client(base_url=site.url) as http:
        login = http.post("/login", data={"key": site.key}, headers={"Sec-Fetch-Site": "same-origin"})
        assert login.status_code == 303
        assert http.get(f"/jobs/{job.id}").status_code == 200
        for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {}):
            answer = http.post(f"/jobs/{job.id}/cancel", headers=headers)
            assert answer.status_code == 403, headers
            assert http.post("/login", data={"key": site.key}, headers=headers).status_code == 403
    assert site.jobs.get(job.id).state == "queued"


def test_a_changed_or_foreign_cookie_is_no_session(browser: Browser, site: Site) -> None:
    with httpx.Client(base_url=site.url) as http:
        http.post("/login", data={"key": site.key}, headers={"Sec-Fetch-Site": "same-origin"})
        cookie = http.cookies["duquant_session"]
    payload, _, mac = cookie.rpartition(".")
    for forged in (f"{payload}.{'0' * len(mac)}", f"{payload[:-4]}AAAA.{mac}", "x", ".", "\u00e9.\u00e9", ""):
        answer = httpx.get(site.url, headers={"Cookie": f"duquant_session={forged}".encode()})
        assert (answer.status_code, answer.headers.get("Location")) == (303, "/login"), forged


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_and_fits_a_narrow_screen(browser: Browser, site: Site, scheme: str) -> None:
    job = site.enqueue()
    claim = site.start()
    for layer in range(-1, LAYERS):
        site.do_layer(claim, layer)
    page = open_page(browser, site, width=320, scheme=scheme)
    log_in(page, site)
    for path in ("/", f"/jobs/{job.id}", "/jobs/job_absent"):
        page.goto(site.url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 320, path
        assert page.evaluate(_LOW_CONTRAST) == [], path
    # The check itself must be able to see a fault.
    page.evaluate(
        "document.querySelector('h1').style.color = getComputedStyle(document.querySelector('.card')).borderColor"
    )
    assert len(page.evaluate(_LOW_CONTRAST)) == 1
    # A page that is not there is the one error that the browser itself reports.
    assert [text for text in site.complaints if "404" not in text] == []


def test_the_pages_read_without_javascript(browser: Browser, site: Site) -> None:
    job = site.enqueue()
    page = open_page(browser, site, script=False)
    log_in(page, site)
    page.goto(f"{site.url}/jobs/{job.id}")
    expect(page.get_by_text("Place in the queue")).to_be_visible()
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.get_by_role("status").filter(has_text="cancelled")).to_be_visible()


def test_the_keyboard_reaches_everything(browser: Browser, site: Site) -> None:
    site.enqueue()
    page = open_page(browser, site)
    log_in(page, site)
    names = []
    for _ in range(12):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.textContent.trim().split(/\\s+/).join(' ')"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", names[-1]
        if "details" in names[-1]:
            break
    assert names[0] == "Skip to the content"
    assert "Log out" in names
    assert "details" in names[-1]
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="smollm2-135m")).to_be_visible()


_LOW_CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const part = rgb.slice(0, 3).map((v) => v/255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const behind = (node) => {
    for (let each = node; each; each = each.parentElement) {
      const color = parse(getComputedStyle(each).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.checkVisibility()) continue;
    if (node.closest('.skip, .layer-running')) continue;  // off the page; fading in and out
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push(`${walker.currentNode.textContent.trim()}: ${ratio.toFixed(2)}`);
  }
  return low;
}"""
