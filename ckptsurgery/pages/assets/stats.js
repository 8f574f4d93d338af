"use strict";
// Statistics: a histogram of each tensor; before as an outline, what is promised as lines at the mean and at mean ± std.
const wide = 360, high = 96, list = node("main", { class: "histograms" });
let sought = "";

function range(row) {
  const sides = [row.now, row.before].filter((side) => side && side.min !== null);
  const ends = sides.flatMap((side) => [side.min, side.max]);
  if (row.promised) ends.push(row.promised.mean - 1.2 * row.promised.std, row.promised.mean + 1.2 * row.promised.std);
  const low = Math.min(...ends), top = Math.max(...ends), margin = (top - low) * 0.04 || Math.abs(top) * 0.1 || 1;
  return [low - margin, top + margin];
}

// Equal areas for equal counts: the outlines of two tensors of other ranges can be compared.
function steps(side) {
  const total = side.histogram.reduce((sum, count) => sum + count, 0) || 1;
  const width = (side.max - side.min) / side.histogram.length;
  return side.histogram.map((count, at) => [side.min + at * width, side.min + (at + 1) * width, width ? count / total / width : Infinity]);
}

function outline(side, x, y) {
  const points = steps(side).flatMap(([from, to, share]) => [[x(from), y(share)], [x(to), y(share)]]);
  return "M" + [[points[0][0], high], ...points, [points[points.length - 1][0], high]].map(([a, b]) => a.toFixed(1) + " " + b.toFixed(1)).join("L");
}

function picture(row) {
  const svg = drawn("svg", { viewBox: `0 0 ${wide} ${high + 16}`, class: "histogram", role: "img" });
  const [low, top] = range(row);
  const x = (value) => ((value - low) / (top - low)) * wide;
  const sides = [row.now, row.before].filter((side) => side && side.min !== null);
  const most = Math.max(0, ...sides.flatMap((side) => steps(side).map(([, , share]) => share)).filter(Number.isFinite)) || 1;
  const y = (share) => (Number.isFinite(share) ? high - (share / most) * (high - 6) : 6);
  for (const [side, name] of [[row.now, "now"], [row.before, "before"]]) {
    if (!side || side.min === null) continue;
    if (side.max > side.min) svg.append(drawn("path", { d: outline(side, x, y), class: name }));
    else svg.append(drawn("line", { x1: x(side.min), x2: x(side.min), y1: 6, y2: high, class: name }));
  }
  if (row.promised) for (const [at, name] of [[row.promised.mean, "mean"], [row.promised.mean - row.promised.std, "std"], [row.promised.mean + row.promised.std, "std"]]) svg.append(drawn("line", { x1: x(at), x2: x(at), y1: 0, y2: high, class: "promise " + name }));
  for (const [at, anchor] of [[low, "start"], [top, "end"]]) svg.append(drawn("text", { x: at === low ? 0 : wide, y: high + 13, "text-anchor": anchor }, at.toPrecision(3)));
  return svg;
}

function numbers(side) {
  const text = side.mean === null ? "no finite values" : `mean ${side.mean.toPrecision(4)}, std ${side.std.toPrecision(4)}`;
  return side.nonfinite ? `${text}, ${side.nonfinite.toLocaleString("en")} not finite` : text;
}

function figure(row) {
  const said = [node("code", {}, row.now.name), node("span", {}, row.now.spec), node("div", {}, "now: " + numbers(row.now))];
  if (row.before) said.push(node("div", {}, "before: " + numbers(row.before)));
  if (row.promised) said.push(node("div", { class: row.promised.kept ? "kept" : "broken" }, (row.promised.kept ? "as promised: " : "not as promised: ") + row.promised.text));
  return node("figure", {}, picture(row), node("figcaption", {}, ...said));
}

function draw() {
  const rows = data.rows.filter((row) => row.now.name.includes(sought));
  document.body.dataset.found = rows.length;
  list.replaceChildren(...rows.map(figure));
}

page(data.facts, (text) => { sought = text; draw(); }, node("div", {}, list, data.left ? node("section", { class: "list" }, "… and " + many(data.left, "more tensor")) : ""));
draw();
