"use strict";
// Shared by all pages: small builders, the theme, and a tree of folded keys.
const data = JSON.parse(document.getElementById("data").textContent);
const hash = new URLSearchParams(location.hash.slice(1));

function node(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "onclick" || name === "oninput") made[name] = value;
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function drawn(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (count >= 999.5 && at < units.length - 1) { count /= 1000; at += 1; }
  return (at ? count.toFixed(count < 10 ? 2 : count < 100 ? 1 : 0) : count) + " " + units[at];
}

function many(count, noun) { return count.toLocaleString("en") + " " + noun + (count === 1 ? "" : "s"); }

function hue(number) { return "hsl(" + ((number * 137.5 + 210) % 360).toFixed(0) + " 62% 52%)"; }

function theme(name) {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = name || (dark ? "dark" : "light");
}

// A folded key is cut at the dots that are outside of braces.
function segments(text) {
  const found = [];
  let depth = 0, start = 0;
  for (let at = 0; at < text.length; at += 1) {
    const letter = text[at];
    if (letter === "{") depth += 1;
    else if (letter === "}") depth -= 1;
    else if (letter === "." && !depth) { found.push(text.slice(start, at)); start = at + 1; }
  }
  found.push(text.slice(start));
  return found;
}

// "h.{0..3,7}.w" as a test of concrete keys such as "h.2.w".
function holds(text, key) {
  const parts = text.split(/(\{[^{}]*\})/);
  let source = "";
  const ranges = [];
  for (const part of parts) {
    if (part.startsWith("{")) { ranges.push(part.slice(1, -1).split(",")); source += "([^.]+?)"; }
    else source += part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  }
  const found = new RegExp("^" + source + "$").exec(key);
  if (!found) return false;
  return ranges.every((choices, n) => choices.some((choice) => {
    const [low, high] = choice.split("..");
    return high === undefined ? low === found[n + 1] : +low <= +found[n + 1] && +found[n + 1] <= +high;
  }));
}

class Tree {
  // rows: [text, count, spec, bytes, ...facts]; look(row) gives {dot, mark, tie, groups}.
  constructor(title, tree, look, pick) {
    this.title = title; this.tree = tree; this.look = look; this.pick = pick;
    this.root = { name: "", children: new Map(), row: null, bytes: 0, count: 0, groups: new Map(), open: true, depth: -1 };
    for (const row of tree.rows) this.add(row);
    this.join(this.root);
    this.element = node("div", { class: "tree" });
    this.openBest(36);
  }

  add(row) {
    let at = this.root;
    const groups = this.look(row).groups || [];
    for (const name of ["", ...segments(row[0])]) {
      if (name !== "" || at !== this.root) {
        if (!at.children.has(name)) at.children.set(name, { name, children: new Map(), row: null, bytes: 0, count: 0, groups: new Map(), open: false, parent: at });
        at = at.children.get(name);
      }
      at.bytes += row[3]; at.count += row[1];
      for (const group of groups) at.groups.set(group, (at.groups.get(group) || 0) + row[3]);
    }
    if (at.row) at.children.set(" " + row[2] + at.children.size, { name: "", children: new Map(), row, bytes: row[3], count: row[1], groups: new Map(groups.map((g) => [g, row[3]])), open: false, parent: at });
    else at.row = row;
  }

  // A node with one child and nothing of its own is joined with it.
  join(at) {
    const kept = [];
    for (let child of at.children.values()) {
      while (child.children.size === 1 && !child.row) {
        const only = [...child.children.values()][0];
        only.name = child.name + "." + only.name;
        child = only;
      }
      child.parent = at;
      this.join(child);
      kept.push(child);
    }
    at.children = new Map(kept.map((child, n) => [n, child]));
  }

  openBest(room) {
    let level = [...this.root.children.values()], shown = level.length;
    while (level.length) {
      const next = level.flatMap((at) => [...at.children.values()]);
      if (!next.length || shown + next.length > room) break;
      for (const at of level) at.open = true;
      shown += next.length; level = next;
    }
    if (shown < room) {
      for (const at of level.sort((a, b) => b.bytes - a.bytes)) {
        if (at.children.size && shown + at.children.size <= room) { at.open = true; shown += at.children.size; }
      }
    }
  }

  visible() {
    const found = [];
    const walk = (at, depth) => {
      for (const child of at.children.values()) {
        child.depth = depth; found.push(child);
        if (child.open) walk(child, depth + 1);
      }
    };
    walk(this.root, 0);
    return found;
  }

  all() {
    const found = [];
    const walk = (at) => { for (const child of at.children.values()) { found.push(child); walk(child); } };
    walk(this.root);
    return found;
  }

  search(text) {
    this.found = new Set();
    for (const at of this.all()) {
      if (!at.row || !text) continue;
      if (at.row[0].includes(text) || holds(at.row[0], text)) {
        this.found.add(at);
        for (let up = at.parent; up && up !== this.root; up = up.parent) up.open = true;
      }
    }
    return this.found.size;
  }

  draw(picked) {
    const largest = Math.max(1, ...[...this.root.children.values()].map((at) => at.bytes));
    const rows = this.shown = this.visible();
    const built = rows.map((at) => {
      const look = at.row ? this.look(at.row) : {};
      const shown = node("div", { class: ["row", look.mark || "", picked === at ? "picked" : "", this.found && this.found.has(at) ? "found" : ""].join(" "), title: at.row ? at.row[0] : at.name },
        node("span", { class: "fold", style: "margin-left:" + at.depth * 14 + "px" }, at.children.size ? (at.open ? "▾" : "▸") : ""),
        look.dot ? node("span", { class: "dot", style: "background:" + look.dot }) : null,
        node("span", { class: "name" }, at.name || "·"),
        node("span", { class: "spec" }, at.row ? at.row[2] + (at.row[1] > 1 ? " × " + at.row[1].toLocaleString("en") : "") : many(at.count, "tensor")),
        look.tie ? node("span", { class: "tie", style: "color:" + look.tie }, "tied") : null,
        node("span", { class: "size" }, bytes(at.bytes)),
        node("span", { class: "bar" }, node("i", { style: "width:" + (100 * at.bytes / largest).toFixed(1) + "%" })));
      shown.onclick = () => { if (at.children.size) at.open = !at.open; this.pick(at); };
      return shown;
    });
    const left = this.tree.left ? [node("div", { class: "row" }, "… and " + many(this.tree.left, "more key"))] : [];
    this.element.replaceChildren(node("h2", {}, this.title + ": " + many(this.tree.keys, "key") + ", " + bytes(this.tree.bytes)), ...built, ...left);
    this.elements = built;
  }
}

function page(facts, search, body) {
  theme(hash.get("theme"));
  const field = node("input", { type: "search", placeholder: "search keys: q_proj, or layers.3.mlp.up.weight", "aria-label": "search keys", oninput: () => search(field.value.trim()) });
  const button = node("button", { onclick: () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark") }, "light / dark");
  document.body.append(
    node("header", {}, node("h1", {}, data.title), node("div", { class: "facts" }, ...facts.filter(Boolean).map((text) => node("span", {}, text))),
      ...(data.warnings || []).map(([severity, text]) => node("div", { class: severity === "note" ? "facts" : "note" }, severity + ": " + text)),
      node("div", { class: "tools" }, field, button)),
    body);
  if (hash.get("search")) { field.value = hash.get("search"); search(field.value); }
  requestAnimationFrame(() => requestAnimationFrame(() => { document.body.dataset.painted = performance.now().toFixed(0); }));
}
