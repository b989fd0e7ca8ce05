// The server renders; this keeps what is shown current. Every frame of the stream says that
// there is something newer, and the parts of this same page that differ are replaced. A part
// that somebody is in (focus) is left alone until they leave it.
"use strict";

const link = document.getElementById("link");
let busy = false, again = false;

function say(text, bad) {
  if (link.textContent !== text) link.textContent = text;
  link.className = bad ? "bad" : "";
}

async function refresh() {
  if (busy) { again = true; return; }
  busy = true;
  try {
    const answer = await fetch(location.href, { headers: { "x-outrigger-part": "1" } });
    if (!answer.ok) throw new Error(answer.status);
    const next = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const part of document.querySelectorAll("[data-part]")) {
      const newer = next.getElementById(part.id);
      if (newer && !part.contains(document.activeElement) && !part.isEqualNode(newer)) part.replaceWith(document.adoptNode(newer));
    }
    say("live", false);
  } catch (e) {
    say("what is shown is the last known state", true);
  }
  busy = false;
  if (again) { again = false; refresh(); }
}

if (document.body.dataset.live) {
  const source = new EventSource(document.body.dataset.live);
  source.onmessage = refresh;
  source.onerror = () => say("not connected; what is shown is the last known state", true);
  addEventListener("pagehide", () => source.close());
}

// g and a letter go to a page, as in other consoles; never while somebody types.
const pages = { o: "/", r: "/rollouts", e: "/experiments", m: "/models", p: "/optimisers", n: "/regions", c: "/cache", a: "/alerts", t: "/audit" };
let g = false;
addEventListener("keydown", (e) => {
  if (e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName)) return;
  if (g && pages[e.key]) location.href = pages[e.key] + location.search;
  g = e.key === "g";
});
