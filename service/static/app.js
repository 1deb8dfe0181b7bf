// Keeps a page current: when the server says that something changed, read the page again and swap the parts marked
// data-live that differ. Everything is there without this file too, on a reload.
"use strict";

(() => {
  const url = document.body.dataset.stream;
  if (!url || !window.EventSource) return;

  const status = document.getElementById("connection");
  let isReading = false;
  let isStale = false;

  function say(text, name) {
    if (status.dataset.state === name) return;
    status.dataset.state = name;
    status.textContent = text;
    status.hidden = false;
  }

  function swap(fresh) {
    const focused = document.activeElement && document.activeElement.id;
    for (const part of document.querySelectorAll("[data-live]")) {
      const next = fresh.getElementById(part.id);
      if (!next || (next.innerHTML === part.innerHTML && next.className === part.className)) continue;
      const open = [...part.querySelectorAll("details")].map((each) => each.open);
      part.className = next.className;
      part.replaceChildren(...next.childNodes);
      part.querySelectorAll("details").forEach((each, index) => { each.open = open[index] ?? each.open; });
    }
    document.title = fresh.title;
    if (focused && document.activeElement === document.body) document.getElementById(focused)?.focus();
  }

  async function read() {
    if (isReading) { isStale = true; return; }
    isReading = true;
    try {
      do {
        isStale = false;
        const answer = await fetch(location.href, { headers: { Accept: "text/html" }, credentials: "same-origin" });
        if (answer.redirected && new URL(answer.url).pathname === "/login") { location.assign("/login"); return; }
        if (!answer.ok) throw new Error(`status ${answer.status}`);
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
        swap(fresh);
        if (source.readyState === EventSource.CLOSED) say("Not live: reload to see changes", "lost");
        else say("Live", "live");
        if (!fresh.body.dataset.stream) { source.close(); say("Ended", "ended"); }
      } while (isStale);
    } catch {
      say("Not current: the server does not answer", "lost");
    } finally {
      isReading = false;
    }
  }

  const source = new EventSource(url);
  source.addEventListener("change", read);
  source.onopen = () => say("Live", "live");
  source.onerror = () => {
    say("Not current: trying to reconnect", "lost");
    // A refused stream (the session ended, too many are open) is never tried again by the browser; read the page once.
    if (source.readyState === EventSource.CLOSED) read();
  };
})();
