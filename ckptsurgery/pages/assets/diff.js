"use strict";
// A comparison: layer by role, the darker the further apart.
const detail = node("aside", {});
const numbers = data.rows.flatMap(([, cells]) => Object.values(cells).filter(Array.isArray).map(([most]) => most)).filter((most) => most > 0);
const low = Math.log10(Math.min(...numbers, 1)), high = Math.log10(Math.max(...numbers, 1e-30));
const table = node("table", { class: "heat" });
let sought = "";

function shade(cell) {
  if (cell === undefined) return "transparent";
  if (cell === 0) return "var(--soft)";
  const share = cell[0] > 0 && high > low ? (Math.log10(cell[0]) - low) / (high - low) : 0.5;
  return "hsl(" + (48 - 48 * share).toFixed(0) + " 90% " + (68 - 26 * share).toFixed(0) + "%)";
}

function show(role, layer, cell) {
  const key = layer < 0 ? role : role.replace("{i}", layer);
  const facts = cell === 0 ? ["equal"] : [`max |a - b| ${cell[0]}`, `relative ${cell[1]}`, cell[2] === null ? "the dtype is not compared by values" : `${many(cell[2], "element")} of ${cell[3].toLocaleString("en")} differ`, cell[4] === null ? "" : `cosine ${cell[4]}`];
  detail.replaceChildren(node("h3", {}, "tensor"), node("code", {}, key), ...facts.filter(Boolean).map((text) => node("div", {}, text)), ...lists());
}

function lists() {
  return data.lists.flatMap(([name, count, lines]) => [node("h3", {}, `${name}: ${count.toLocaleString("en")}`), node("ul", {}, ...lines.map((text) => node("li", {}, node("code", {}, text))))]);
}

function draw() {
  const columns = data.columns.slice(0, 400);
  const head = node("tr", {}, node("th", {}, ""), ...columns.map((layer) => node("td", { class: "none" }, layer % 5 ? "" : String(layer))));
  const worst = (cells) => Math.max(-1, ...Object.values(cells).map((cell) => (cell === 0 ? -1 : cell[0])));
  const rows = data.rows.filter(([role, cells]) => !sought || role.includes(sought) || Object.keys(cells).some((layer) => role.replace("{i}", layer).includes(sought)));
  rows.sort((a, b) => worst(b[1]) - worst(a[1]));
  document.body.dataset.found = rows.length;
  const built = rows.map(([role, cells]) => {
    const one = (layer) => {
      const cell = cells[layer];
      const made = node("td", { class: cell === undefined ? "none" : "", style: "background:" + shade(cell), title: cell === undefined ? null : cell === 0 ? "equal" : String(cell[0]) });
      if (cell !== undefined) made.onclick = () => show(role, layer, cell);
      return made;
    };
    return node("tr", {}, node("th", { title: role }, role), ...(cells[-1] === undefined ? columns.map(one) : [one(-1)]));
  });
  table.replaceChildren(head, ...built);
}

const scale = numbers.length ? node("div", { class: "legend" }, `max |a - b|: ${Math.min(...numbers).toPrecision(2)}`, node("i", { style: "background:linear-gradient(90deg," + [0, 0.25, 0.5, 0.75, 1].map((share) => shade([10 ** (low + share * (high - low))])).join(",") + ")" }), Math.max(...numbers).toPrecision(2), node("span", {}, "plain: equal; empty: not in both, or of another shape")) : node("div", { class: "legend" }, data.identical ? "identical" : "no values differ");
const left = data.left ? node("section", { class: "list" }, "… and " + many(data.left, "more role")) : null;
page(data.facts, (text) => { sought = text; draw(); }, node("main", {}, node("div", {}, scale, table, left || ""), detail));
detail.replaceChildren(...lists());
draw();
