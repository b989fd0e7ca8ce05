// Runs the script of the page over the page in a document model that is just large
// enough for it, feeds it two frames, and prints what is shown. Anything the script uses
// that is not modelled here throws, and so does every way of turning text into markup.
"use strict";
const fs = require("fs");
const [script, dir] = process.argv.slice(2);

class Element {
  constructor(tag) { this.tag = tag; this.nodes = []; this.attributes = {}; this.dataset = {}; this.style = {}; this.parent = null; this.listeners = {}; this.hidden = false; }
  get children() { return this.nodes.filter((n) => n instanceof Element); }
  get className() { return this.attributes.class || ""; }
  set className(v) { this.attributes.class = v; }
  get id() { return this.attributes.id || ""; }
  get textContent() { return this.nodes.map((n) => (typeof n === "string" ? n : n.textContent)).join(""); }
  set textContent(v) { this.nodes = v === "" ? [] : [String(v)]; }
  set innerHTML(_) { throw new Error("innerHTML"); }
  setAttribute(k, v) { if (k === "style" || k.startsWith("on")) throw new Error(k); this.attributes[k] = String(v); }
  removeAttribute(k) { delete this.attributes[k]; }
  addEventListener(k, f) { this.listeners[k] = f; }
  append(...es) { for (const e of es) this.insertBefore(e, null); }
  insertBefore(e, before) {
    e.remove();
    e.parent = this;
    if (before) this.nodes.splice(this.nodes.indexOf(before), 0, e); else this.nodes.push(e);
  }
  remove() { if (this.parent) { this.parent.nodes.splice(this.parent.nodes.indexOf(this), 1); this.parent = null; } }
  contains(e) { for (; e; e = e.parent) if (e === this) return true; return false; }
  matches(s) { return s.startsWith(".") ? this.className.split(" ").includes(s.slice(1)) : this.tag === s; }
  closest(s) { for (let e = this; e; e = e.parent) if (e.matches(s)) return e; return null; }
  querySelector(s) {
    if (s.startsWith(":scope > ")) return this.children.find((c) => c.matches(s.slice(9))) || null;
    for (const c of this.children) { const hit = c.matches(s) ? c : c.querySelector(s); if (hit) return hit; }
    return null;
  }
  all() { return this.children.flatMap((c) => [c, ...c.all()]); }
}

// The page is our own and well formed; names of attributes and text are all that matters.
function parse(html) {
  const root = new Element("#document");
  let at = root;
  const decode = (s) => s.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&#34;/g, '"').replace(/&#39;/g, "'").replace(/&amp;/g, "&");
  for (const m of html.matchAll(/<!doctype[^>]*>|<!--.*?-->|<(\/?)([a-z0-9]+)([^>]*)>|([^<]+)/gs)) {
    if (m[4]) { if (m[4].trim()) at.nodes.push(decode(m[4])); continue; }
    if (!m[2]) continue;
    if (m[1]) { if (at.tag !== m[2]) throw new Error(`</${m[2]}> closes <${at.tag}>`); at = at.parent; continue; }
    const e = new Element(m[2]);
    for (const a of m[3].matchAll(/([a-z-]+)(?:="([^"]*)")?/g)) {
      e.attributes[a[1]] = decode(a[2] || "");
      if (a[1].startsWith("data-")) e.dataset[a[1].slice(5)] = e.attributes[a[1]];
      if (a[1] === "hidden") e.hidden = true;
    }
    at.append(e);
    if (!["meta", "link", "br", "input"].includes(m[2])) at = e;
  }
  if (at !== root) throw new Error(`<${at.tag}> is not closed`);
  return root;
}

const tree = parse(fs.readFileSync(dir + "/page.html", "utf8"));
const find = (id) => tree.all().find((e) => e.id === id) || null;
let source = null;
globalThis.document = {
  getElementById: (id) => { const e = find(id); if (!e) throw new Error("no element #" + id); return e; },
  createElement: (tag) => new Element(tag),
  body: tree.all().find((e) => e.tag === "body"),
};
globalThis.EventSource = class {
  constructor(url) { if (url !== "/events") throw new Error(url); this.listeners = {}; source = this; }
  addEventListener(k, f) { this.listeners[k] = f; }
  close() { this.closed = true; }
};
(0, eval)(fs.readFileSync(script, "utf8"));

const frame = (i) => source.onmessage({ data: fs.readFileSync(`${dir}/${i}.json`, "utf8") });
frame(0);
const row = find("node-rows").children[0];
frame(1);
for (const id of ["f-requests", "f-rate", "f-acked", "link", "alert-list", "model-list", "rollout-list", "node-rows", "audit-rows", "region-rows", "c-process"])
  console.log(id + ": " + find(id).textContent.replace(/\s+/g, " "));
console.log("current: " + tree.all().filter((e) => e.attributes["aria-current"] === "step").map((e) => e.textContent).join());
console.log("shares: " + find("model-list").all().find((e) => e.matches(".split")).attributes["aria-label"]);
console.log("elements: " + (tree.all().some((e) => e.tag === "img") ? "markup" : "clean"));
console.log("kept: " + (find("node-rows").children[0] === row)); // a frame keeps the rows it shows again
source.listeners.problem({ data: '{"error":"gone"}' });
if (find("link").textContent !== "gone") throw new Error("the problem is not shown");
find("pause").listeners.click();
if (!source.closed || find("pause").attributes["aria-pressed"] !== "true") throw new Error("pause does not pause");
