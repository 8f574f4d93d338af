"use strict";
// A checkpoint: one tree, and what else lies in the file.
let picked = null;
const tieNames = [...new Set(data.source.rows.map((row) => row[4]).filter(Boolean))];
const detail = node("aside", {});
const tree = new Tree("tensors", data.source, (row) => ({ groups: [], tie: row[4] ? hue(tieNames.indexOf(row[4]) + 3) : null }), (at) => {
  picked = at;
  tree.draw(picked);
  if (!at.row) return lists();
  const [text, count, spec, size, tie] = at.row;
  detail.replaceChildren(node("h3", {}, "tensor"), node("code", {}, text), node("div", {}, `${spec}${count > 1 ? ", " + many(count, "tensor") : ""}, ${bytes(size)}`), tie ? node("div", {}, "one tensor with " + tie) : "");
});

function lists() {
  const parts = data.lists.flatMap(([name, lines]) => [node("h3", {}, name), node("ul", {}, ...lines.map((text) => node("li", {}, node("code", {}, text))))]);
  detail.replaceChildren(...(parts.length ? parts : [node("h3", {}, "nothing but tensors is in there")]));
}

page(data.facts, (text) => { document.body.dataset.found = tree.search(text); tree.draw(picked); }, node("main", {}, node("div", { class: "trees single" }, tree.element), detail));
lists();
tree.draw();
