"use strict";
// A plan: two trees, a ribbon for each rule between them, and what one row is made of.
let picked = null, ruled = null;
const tieNames = [...new Set(data.target.rows.map((row) => row[7]).filter(Boolean))];
const colour = (rule) => (data.rules[rule].rest ? "#8a94a3" : hue(rule));

function lookSource(row) {
  const [rule, , said] = row.slice(4);
  return { dot: rule >= 0 ? colour(rule) : null, mark: rule < 0 ? "lost" : "", groups: rule >= 0 ? [rule] : [], said };
}

function lookTarget(row) {
  const [rule, , said, tie] = row.slice(4);
  return { dot: rule >= 0 ? colour(rule) : null, mark: rule < 0 && !tie ? "made" : "", tie: tie ? hue(tieNames.indexOf(tie) + 3) : null, groups: rule >= 0 ? [rule] : [], said };
}

const source = new Tree("source", data.source, lookSource, (at) => pick(at, source));
const target = new Tree("target", data.target, lookTarget, (at) => pick(at, target));
const ribbons = drawn("svg", { class: "ribbons" });
const detail = node("aside", {});
const body = node("main", {}, node("div", { class: "trees" }, source.element, ribbons, target.element), detail);

function draw() {
  source.draw(picked); target.draw(picked);
  requestAnimationFrame(drawRibbons);
}

function ends(tree) {
  // rule -> [height, thickness] of each visible row that holds it, where its children are not visible themselves
  const found = new Map();
  tree.shown.forEach((at, n) => {
    if (at.open && at.children.size && !at.row) return;
    const element = tree.elements[n], middle = element.offsetTop + element.offsetHeight / 2;
    const own = at.open && at.row ? tree.look(at.row).groups.map((rule) => [rule, at.row[3]]) : [...at.groups];
    own.forEach(([rule, size], m) => {
      const shift = own.length > 1 ? (m / (own.length - 1) - 0.5) * 14 : 0;
      if (!found.has(rule)) found.set(rule, []);
      found.get(rule).push([middle + shift, size]);
    });
  });
  return found;
}

function drawRibbons() {
  const left = ends(source), right = ends(target), top = ribbons.parentElement.getBoundingClientRect().top;
  const width = ribbons.clientWidth || 90, curves = [];
  const thick = (size) => Math.max(1, Math.min(9, Math.log2(1 + size / 1024) * 0.5));
  const offset = ribbons.getBoundingClientRect().top - top;
  for (const [rule, ones] of left) {
    const others = right.get(rule) || [];
    if (!others.length || ones.length * others.length > 4000) continue;
    const mean = (list) => list.reduce((sum, [y]) => sum + y, 0) / list.length;
    const knot = (mean(ones) + mean(others)) / 2, faded = ruled !== null && ruled !== rule;
    const curve = (x0, y0, x1, y1, size) => {
      const bend = (x0 + x1) / 2;
      curves.push(drawn("path", { d: `M${x0} ${y0 - offset}C${bend} ${y0 - offset} ${bend} ${y1 - offset} ${x1} ${y1 - offset}`, fill: "none", stroke: colour(rule), "stroke-width": thick(size), "stroke-opacity": faded ? 0.06 : data.rules[rule].rest ? 0.25 : 0.55 }));
    };
    if (ones.length === 1 && others.length === 1) curve(0, ones[0][0], width, others[0][0], Math.max(ones[0][1], others[0][1]));
    else {
      for (const [y, size] of ones) curve(0, y, width / 2, knot, size);
      for (const [y, size] of others) curve(width / 2, knot, width, y, size);
    }
  }
  ribbons.replaceChildren(...curves);
}

function pick(at, tree) {
  picked = at;
  const rules = [...at.groups.keys()];
  ruled = rules.length === 1 ? rules[0] : null;
  draw();
  if (!at.row) return overview(rules);
  const [text, count, spec, size, rule, program] = at.row, said = tree.look(at.row).said;
  const tie = tree === target ? at.row[7] : "";
  const parts = [node("h3", {}, tree === target ? "target" : "source"), node("code", {}, text), node("div", {}, `${spec}${count > 1 ? ", " + many(count, "tensor") : ""}, ${bytes(size)}`)];
  if (said) parts.push(node("div", { class: rule < 0 && tree === source ? "note" : "" }, said));
  if (tie) parts.push(node("div", {}, "one tensor with " + tie));
  if (rule >= 0) parts.push(...ruleParts(rule));
  if (program >= 0 && data.programs[program]) parts.push(...programParts(data.programs[program], count));
  detail.replaceChildren(...parts);
}

function ruleParts(rule) {
  const told = data.rules[rule];
  return [node("h3", {}, told.rest ? "rest" : "rule"), node("code", {}, told.text), told.place ? node("div", { class: "facts" }, told.place) : null].filter(Boolean);
}

function programParts(program, count) {
  const list = (title, items) => items.length ? [node("h3", {}, title), node("ul", {}, ...items.map((text) => node("li", {}, node("code", {}, text))))] : [];
  return [
    node("h3", {}, "what happens: " + program.kind + (count > 1 ? " (the first of these)" : "")),
    ...list("reads", program.reads), ...list("then", program.then), ...list("makes", program.makes),
    ...program.moves.flatMap(diagram)];
}

function diagram(move) {
  const side = (shapes) => {
    const sizes = shapes.map((shape) => [shape.length > 1 ? shape[0] : 1, shape.reduce((a, b) => a * b, 1) / (shape.length > 1 ? shape[0] : 1)]);
    const tallest = Math.max(...sizes.map(([rows]) => rows)), widest = Math.max(...sizes.map(([, columns]) => columns));
    let y = 0;
    return sizes.map(([rows, columns], n) => {
      const box = { y: y + 14, height: Math.max(14, 110 * Math.sqrt(rows / tallest)), width: Math.max(16, 125 * Math.sqrt(columns / widest)), text: "[" + shapes[n].join(", ") + "]" };
      y = box.y + box.height + 8;
      return box;
    });
  };
  const left = side(move.sources), right = side(move.targets);
  const bottom = Math.max(...[...left, ...right].map((box) => box.y + box.height)) + 4;
  const picture = drawn("svg", { class: "diagram", viewBox: `0 0 300 ${bottom}`, role: "img", "aria-label": "which part of which tensor goes where" });
  const frame = (box, x) => {
    picture.append(drawn("text", { x, y: box.y - 3 }, box.text), drawn("rect", { class: "frame", x, y: box.y, width: box.width, height: box.height }));
  };
  left.forEach((box) => frame(box, 2)); right.forEach((box) => frame(box, 165));
  move.pieces.forEach((piece, n) => {
    for (const [[number, boxes], all, x] of [[piece.from, left, 2], [piece.to, right, 165]]) {
      const frame = all[number];
      for (const [top, low, start, end] of boxes) {
        picture.append(drawn("rect", { x: x + start * frame.width, y: frame.y + top * frame.height, width: Math.max(0.8, (end - start) * frame.width), height: Math.max(0.8, (low - top) * frame.height), fill: hue(n), "fill-opacity": 0.75 }));
      }
    }
  });
  return [node("h3", {}, "where the pieces go"), picture, move.more > 0 ? node("div", { class: "facts" }, "… and " + many(move.more, "more piece")) : node("div", { class: "facts" }, "one colour is one piece; rows are the first axis, columns all others")];
}

function overview(only) {
  const rules = only || data.rules.map((_, n) => n);
  const rows = rules.slice(0, 300).map((rule) => {
    const line = node("div", { class: "rule" }, node("b", { style: "background:" + colour(rule) }), node("code", {}, data.rules[rule].text));
    line.onclick = () => { ruled = ruled === rule ? null : rule; drawRibbons(); };
    return line;
  });
  detail.replaceChildren(node("h3", {}, only ? "rules of this part" : "rules"), ...rows, node("div", { class: "facts" }, "a click on a tensor shows what it is made of"));
}

page([data.ends, data.kinds.join(", "), data.cost], (text) => { const found = source.search(text) + target.search(text); document.body.dataset.found = found; draw(); }, body);
overview();
draw();
if (hash.get("pick")) {
  for (const tree of [target, source]) {
    const at = tree.all().find((one) => one.row && (one.row[0] === hash.get("pick") || holds(one.row[0], hash.get("pick"))));
    if (at) { for (let up = at.parent; up; up = up.parent) up.open = true; pick(at, tree); break; }
  }
}
addEventListener("resize", drawRibbons);
