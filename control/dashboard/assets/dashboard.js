// The page is rendered from one JSON frame a second. Everything goes in as text
// (textContent): nothing a model name, an alert or a reason contains becomes markup.
"use strict";

const $ = (id) => document.getElementById(id);
const num = (x) => Number(x || 0);
const big = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const count = (x) => big.format(num(x));
const percent = (part, whole) => (whole > 0 ? big.format((100 * part) / whole) + " %" : "–");
const millis = (x) => (num(x) > 0 ? (num(x) < 10 ? num(x).toFixed(2) : count(Math.round(num(x)))) + " ms" : "–");
const clock = (t) => (t ? new Date(t).toLocaleTimeString() : "–");
const moment = (t) => (t ? new Date(t).toLocaleString() : "–");

function set(node, text, cls) {
  text = String(text);
  if (node.textContent !== text) node.textContent = text;
  if (cls !== undefined && node.className !== cls) node.className = cls;
}

function make(tag, cls, text) {
  const e = document.createElement(tag);
  if (cls) e.className = cls;
  if (text !== undefined) e.textContent = text;
  return e;
}

// list reconciles children by key, so that focus, selection and scroll survive a frame.
function list(parent, items, key, create, update) {
  const old = new Map(Array.from(parent.children, (c) => [c.dataset.key, c]));
  items.forEach((item, i) => {
    const k = key(item);
    let child = old.get(k);
    old.delete(k);
    if (!child) {
      child = create(item);
      child.dataset.key = k;
    }
    if (parent.children[i] !== child) parent.insertBefore(child, parent.children[i] || null);
    update(child, item);
  });
  old.forEach((child) => child.remove());
  const empty = parent.closest("section")?.querySelector(":scope > .empty");
  if (empty && parent.closest("section").contains(parent) && !parent.dataset.inner) {
    empty.hidden = items.length > 0;
    const scroll = parent.closest(".scroll");
    if (scroll) scroll.hidden = items.length === 0;
  }
}

// rows shows a table: cells(item) gives [text, class] per column, the first is the head.
function rows(tbody, items, key, cells) {
  list(tbody, items, key, (item) => {
    const tr = make("tr");
    cells(item).forEach((_, i) => {
      const c = make(i === 0 ? "th" : "td");
      if (i === 0) c.scope = "row";
      tr.append(c);
    });
    return tr;
  }, (tr, item) => cells(item).forEach(([text, cls], i) => set(tr.children[i], text, cls || "")));
}

// bar shows shares as a strip; parts are [label, weight].
function bar(node, parts) {
  const total = parts.reduce((sum, [, w]) => sum + w, 0);
  node.setAttribute("aria-label", parts.map(([l, w]) => l + " " + percent(w, total)).join(", ") || "no data");
  node.dataset.inner = "1";
  list(node, parts.map(([l, w], i) => ({ l, w, i })), (p) => String(p.i), () => make("span"), (e, p) => {
    set(e, "", "k" + (p.i % 6));
    e.title = p.l + " " + percent(p.w, total);
    e.style.flexGrow = String(p.w);
    e.hidden = p.w === 0;
  });
}

let before = null; // {at, requests: Map} of the previous frame, for rates

function rate(id, requests, seconds) {
  const was = before && before.requests.get(id);
  return was === undefined || was === null || seconds <= 0 ? null : Math.max(0, requests - was) / seconds;
}

function showModels(models, seconds, requests) {
  let total = 0, failed = 0, perSecond = 0, known = false;
  const host = $("model-list");
  list(host, models, (m) => m.name, (m) => {
    const card = make("article", "card");
    const head = make("header");
    head.append(make("h3", "", m.name), make("span", "dim about"));
    const scroll = make("div", "scroll");
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "Versions of " + m.name);
    const table = make("table");
    const tr = make("tr");
    [["Version"], ["State"], ["Share", "n"], ["Requests", "n"], ["Per second", "n"], ["Failing", "n"], ["p50", "n"], ["p99", "n"], ["Tokens out", "n"]]
      .forEach(([t, c]) => { const th = make("th", c, t); th.scope = "col"; tr.append(th); });
    const thead = make("thead");
    thead.append(tr);
    const tbody = make("tbody");
    tbody.dataset.inner = "1";
    table.append(thead, tbody);
    scroll.append(table);
    const strip = make("div", "split");
    strip.setAttribute("role", "img");
    card.append(head, strip, scroll);
    return card;
  }, (card, m) => {
    const aliases = Object.entries(m.aliases || {}).map(([a, v]) => a + " → " + v).sort().join(", ");
    set(card.querySelector(".about"), `by ${m.unit}; ${aliases}`);
    bar(card.querySelector(".split"), m.arms.map((a) => [a.name + " (" + a.version + ")", num(a.weight)]));
    const share = new Map();
    m.arms.forEach((a) => share.set(a.version, (share.get(a.version) || 0) + num(a.weight)));
    rows(card.querySelector("tbody"), m.versions, (v) => v.version, (v) => {
      const s = v.stats || {};
      const id = m.name + "\u0000" + v.version;
      const r = rate(id, num(s.requests), seconds);
      const failing = num(s.requests) > 0 && num(s.failures) / num(s.requests);
      return [[v.version], [v.state, v.state === "quarantined" ? "bad" : ""],
        [percent(share.get(v.version) || 0, 10000), "n"], [count(s.requests), "n"], [r === null ? "–" : count(r), "n"],
        [percent(num(s.failures), num(s.requests)), failing > 0.05 ? "n bad" : "n"],
        [millis(s.p50_ms), "n"], [millis(s.p99_ms), "n"], [count(s.tokens_out), "n"]];
    });
    m.versions.forEach((v) => {
      const s = v.stats || {};
      const id = m.name + "\u0000" + v.version;
      const r = rate(id, num(s.requests), seconds);
      total += num(s.requests);
      failed += num(s.failures);
      if (r !== null) { perSecond += r; known = true; }
      requests.set(id, num(s.requests));
    });
  });
  set($("f-requests"), count(total));
  set($("f-rate"), known ? count(perSecond) : "–");
  set($("f-failing"), percent(failed, total), total > 0 && failed / total > 0.05 ? "bad" : "");
}

// The gauge is logarithmic: evidence multiplies. Full means rollback.
function gauge(e) {
  const strength = Math.max(num(e.e_value), num(e.sr_value), 1);
  const limit = Math.max(num(e.threshold), 1.0001);
  return Math.min(1, Math.log(strength) / Math.log(limit));
}

function showRollouts(rollouts) {
  list($("rollout-list"), rollouts, (r) => r.id, (r) => {
    const card = make("article", "card");
    const head = make("header");
    head.append(make("h3", "", r.id), make("span", "state"));
    const rail = make("ol", "rail"), proof = make("div", "proof");
    rail.dataset.inner = proof.dataset.inner = "1";
    card.append(head, rail, proof, make("p", "dim reason"));
    return card;
  }, (card, r) => {
    const over = r.state !== "running";
    const bad = r.state === "rolling_back" || r.state === "rolled_back" || r.state === "aborted";
    set(card.querySelector(".state"), `${r.model}: ${r.last_good} → ${r.candidate}, ${r.state.replace("_", " ")}`, "state " + (bad ? "bad" : over ? "good" : ""));
    list(card.querySelector(".rail"), r.phases.map((p, i) => ({ p, i })), (x) => x.p.name, () => make("li"), (li, { p, i }) => {
      const here = i === num(r.phase);
      const cls = r.state === "completed" || i < num(r.phase) ? "done" : here ? (bad ? "stopped" : "now") : "";
      set(li, `${p.name} ${percent(num(p.weight), 10000)}${here && bad ? " stopped" : ""}`, cls);
      if (here && !over) li.setAttribute("aria-current", "step"); else li.removeAttribute("aria-current");
    });
    const evidence = over && r.rollback ? r.rollback.evidence : r.evidence;
    list(card.querySelector(".proof"), evidence, (e) => e.stratum, (e) => {
      const row = make("div", "evidence");
      const m = make("meter");
      m.min = 0; m.max = 1; m.low = 0.5; m.high = 0.9; m.optimum = 0;
      m.setAttribute("aria-label", "Evidence against the candidate in " + e.stratum);
      row.append(make("span", "", e.stratum), m, make("small"));
      return row;
    }, (row, e) => {
      row.querySelector("meter").value = gauge(e);
      set(row.querySelector("small"), `E ${num(e.e_value).toPrecision(3)}, SR/T ${num(e.sr_value).toPrecision(3)}, rollback at ${num(e.threshold).toPrecision(3)}; ` +
        `candidate ${count(e.candidate_failures)} of ${count(e.candidate_requests)}, baseline ${count(e.baseline_failures)} of ${count(e.baseline_requests)}`);
    });
    const done = r.rollback_completed;
    set(card.querySelector(".reason"), [`started ${moment(r.started_at)}`, r.reason,
      done ? `${count(done.acked)} nodes acknowledged by ${clock(done.acked_at)}${done.laggards.length ? ", missing " + done.laggards.join(", ") : ""}` : ""]
      .filter(Boolean).join("; "));
  });
}

function showCache(c) {
  const p = num(c.hits_process), n = num(c.hits_node), o = num(c.hits_origin), all = p + n + o;
  bar($("cache-bar"), [["process", p], ["node", n], ["origin", o]]);
  set($("c-process"), `${percent(p, all)} (${count(p)})`);
  set($("c-node"), `${percent(n, all)} (${count(n)})`);
  set($("c-origin"), `${percent(o, all)} (${count(o)})`);
  set($("c-stale"), count(c.stale_served), num(c.stale_served) > 0 ? "warn" : "");
  set($("c-lag50"), millis(c.invalidation_lag_p50_ms));
  set($("c-lag99"), millis(c.invalidation_lag_p99_ms));
}

function showNodes(nodes, status) {
  const policy = num(status.policy_position), head = num(status.head);
  rows($("node-rows"), nodes, (n) => n.node.id, (n) => {
    const behind = num(n.acked_position) < policy;
    const lag = head - num(n.feed_applied);
    return [[n.node.id], [n.node.kind], [n.node.region],
      [n.connected ? "connected" : "gone since " + clock(n.since), n.connected ? "good" : "bad"],
      [n.acked_position === "0" ? "–" : n.acked_position + (behind ? " (behind)" : ""), behind ? "n warn" : "n"],
      [num(n.feed_applied) === 0 ? "–" : lag > 0 ? count(lag) + " behind" : "live", "n"],
      [n.nack || "", n.nack ? "long bad" : "long"]];
  });
  const on = nodes.filter((n) => num(n.acked_position) >= policy).length;
  set($("f-acked"), `${on} of ${nodes.length}`, on < nodes.length ? "warn" : "");
}

function showAlerts(alerts) {
  list($("alert-list"), alerts, (a) => a.id, () => {
    const li = make("li");
    li.append(make("strong"), make("span"), make("div", "dim"));
    return li;
  }, (li, a) => {
    if (li.className !== a.severity + (a.resolved_at ? " resolved" : "")) li.className = a.severity + (a.resolved_at ? " resolved" : "");
    set(li.children[0], a.resolved_at ? "resolved " : a.severity + " ");
    set(li.children[1], a.summary);
    set(li.children[2], `${a.id}, ${moment(a.raised_at)}`);
  });
}

function show(frame) {
  const s = frame.status, now = Date.parse(s.now), requests = new Map();
  const seconds = before ? (now - before.at) / 1000 : 0;
  set($("region"), s.region);
  set($("f-head"), s.head);
  set($("f-policy"), s.policy_position);
  set($("f-started"), moment(s.started_at));
  showModels(s.models, seconds, requests);
  showRollouts(s.rollouts);
  showCache(s.cache || {});
  showNodes(s.nodes, s);
  showAlerts(s.alerts);
  rows($("region-rows"), s.regions, (r) => r.name, (r) => [[r.name + (r.local ? " (here)" : "")],
    [r.health + (r.stale ? ", last known" : ""), r.health === "critical" ? "bad" : r.stale ? "warn" : ""],
    [r.gateway], [millis(r.rtt_ms), "n"], [`${num(r.latitude).toFixed(1)}, ${num(r.longitude).toFixed(1)}`]]);
  rows($("audit-rows"), frame.audit, (e) => String(e.position), (e) => [[e.position, "n"], [clock(e.at)], [e.kind], [e.aggregate, "long"], [e.actor], [e.detail, "long"]]);
  before = { at: now, requests };
}

let source = null;
function link(text, bad) { set($("link"), text, bad ? "bad" : ""); }

function start() {
  source = new EventSource(document.body.dataset.events);
  source.onopen = () => link("live", false);
  source.onerror = () => link("not connected; what is shown is the last known state", true);
  source.onmessage = (m) => { link("live", false); show(JSON.parse(m.data)); };
  source.addEventListener("problem", (m) => link(JSON.parse(m.data).error, true));
}

$("pause").addEventListener("click", () => {
  const paused = source !== null;
  $("pause").setAttribute("aria-pressed", String(paused));
  if (paused) {
    source.close();
    source = null;
    link("paused", false);
  } else {
    before = null;
    start();
  }
});
start();
