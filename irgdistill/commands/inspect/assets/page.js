"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const { facts, stages } = data;
const images = facts.images, count = images.length;
const [teacher, ...students] = Object.keys(stages[0].edges);
const state = { stage: 0, cell: null, kept: false, chosen: 0 };
const maps = [], bars = [];

// --- reading the data ---

const byId = (id) => document.getElementById(id);
function bytes(text) {
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}
function words(holder, name) {
  if (typeof holder[name] === "string") {
    const view = new DataView(bytes(holder[name]).buffer);
    holder[name] = Uint16Array.from({ length: view.byteLength / 2 }, (_, i) => view.getUint16(2 * i, true));
  }
  return holder[name];
}
function edge(stage, network, i, j) {
  if (i === j) return 0;
  const a = Math.min(i, j), b = Math.max(i, j);
  return words(stage.edges, network)[a * (2 * count - a - 1) / 2 + b - a - 1] / data.levels;
}
function neighbours(stage, network, i) {
  const all = words(stage.neighbours, network), k = all.length / count;
  return Array.from(all.slice(i * k, (i + 1) * k));
}
const className = (i) => facts.classes[images[i].label];
const number = (value) => value === null ? "–" : value.toFixed(4);

// --- building elements ---

function make(tag, options = {}, ...children) {
  const { text, ...rest } = options, element = document.createElement(tag);
  for (const [name, value] of Object.entries(rest)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}
function picture(i) {
  const small = data.pixels < 48 ? " small" : "";
  return make("img", { class: "thumbnail" + small, src: "data:image/jpeg;base64," + data.thumbnails[i], alt: images[i].name, title: `${images[i].name} (${className(i)})` });
}
function table(target, head, body) {
  const cell = (tag, text, i) => make(tag, { text, ...(/^[–\d-]/.test(text) && i > 0 ? { class: "number" } : {}) });
  target.append(
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { text, scope: "col" })))),
    make("tbody", {}, ...body.map((line) => make("tr", {}, ...line.map((text, i) => cell(i ? "td" : "th", text, i))))),
  );
  target.querySelectorAll("tbody tr:first-child td").forEach((td, i) => {
    if (td.className) target.querySelectorAll("thead th")[i + 1].className = "number";
  });
}

function describe() {
  byId("title").textContent = `${teacher} → ${students.join(", ")}`;
  document.title = `${byId("title").textContent} – instance relationship graphs`;
  byId("subtitle").textContent = `${count} images of ${facts.data.source} (${facts.data.split}), chosen evenly from its classes with seed ${facts.seed}`;
  const several = students.length > 1;
  const head = ["Stage", ...(several ? ["Student"] : []), "Edges: squared difference", "Pearson", "Spearman", `Neighbours@${facts.neighbours}`, "CKA", "Transformation: squared difference", "Pearson"];
  const body = facts.stages.flatMap((stage) => students.map((name) => {
    const { edges, transformation: moved } = stage.numbers[name];
    return [stage.name, ...(several ? [name] : []), ...["mse", "pearson", "spearman", "neighbours", "cka"].map((key) => number(edges[key])), ...["mse", "pearson"].map((key) => moved ? number(moved[key]) : "–")];
  }));
  table(byId("numbers-table"), head, body);
  byId("numbers-legend").textContent = `Squared differences are means, as in the loss. Correlations count every pair of images once. Neighbours@${facts.neighbours}: mean share of common images among the ${facts.neighbours} nearest. –: not defined. Edges on this page are rounded to 1/${data.levels}.`;
  const place = (level) => `${level.exit.height}×${level.exit.width} ${level.exit.layout}`;
  table(byId("plan-table"), ["Stage", "Network", "Last block", "Blocks", "Width", "Map"], facts.plan.pairs.flatMap((pair, i) => ["teacher", "student"].map((role) => [facts.stages[i].name, role, facts.stages[i][role], `${pair[role].blocks.length}`, `${pair[role].exit.channels}`, place(pair[role])])));
  byId("plan-notes").append(...facts.plan.notes.map((text) => make("li", { text })));
  const who = [facts.teacher, ...facts.students].map((one) => `${one.label}: ${one.architecture}, ${one.weights}, ${one.input_size.join("×")}`);
  byId("versions").textContent = who.join(" · ") + " · " + Object.entries(facts.versions).map(([name, version]) => `${name} ${version}`).join(", ");
  byId("overview-figure").src = "data:image/png;base64," + data.overview;
}

// --- edges ---

const colours = { edges: bytes(data.colours.edges), difference: bytes(data.colours.difference) };
const starts = images.flatMap((image, i) => i && image.label !== images[i - 1].label ? [i] : []);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function shown(stage, map, i, j) {
  const value = edge(stage, map.network, i, j);
  return map.difference ? 0.5 + (value - edge(stage, teacher, i, j)) / (2 * stage.half) : value / stage.high;
}
function paint(map) {
  const stage = stages[state.stage], table = map.difference ? colours.difference : colours.edges;
  const picture = new ImageData(count, count), pixels = picture.data;
  for (let i = 0; i < count; i++) for (let j = i; j < count; j++) {
    const k = 3 * Math.round(255 * Math.min(Math.max(shown(stage, map, i, j), 0), 1));
    for (const at of [4 * (i * count + j), 4 * (j * count + i)]) {
      pixels[at] = table[k]; pixels[at + 1] = table[k + 1]; pixels[at + 2] = table[k + 2]; pixels[at + 3] = 255;
    }
  }
  map.source = map.source || new OffscreenCanvas(count, count);
  map.source.getContext("2d").putImageData(picture, 0, 0);
  map.low.textContent = map.difference ? `closer −${stage.half.toPrecision(2)}` : "0";
  map.high.textContent = map.difference ? `+${stage.half.toPrecision(2)} farther` : stage.high.toPrecision(2);
}
function sized(canvas) {
  const box = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(Math.round(box.width * ratio), 1);
  canvas.height = Math.max(Math.round(box.height * ratio), 1);
  return canvas.getContext("2d");
}
function overlay(map) {
  const context = sized(map.canvas), { width, height } = map.canvas, step = width / count;
  context.imageSmoothingEnabled = count > width;
  context.imageSmoothingQuality = "high";
  context.drawImage(map.source, 0, 0, width, height);
  if (4 * (starts.length + 1) <= Math.max(count, 8)) {
    context.fillStyle = "rgba(255, 255, 255, 0.75)";
    for (const at of starts) { context.fillRect(at * step, 0, 1, height); context.fillRect(0, at * step, width, 1); }
  }
  if (state.cell) {
    const [i, j] = state.cell;
    context.lineWidth = 2; context.strokeStyle = "#fff"; context.strokeRect(j * step - 2, i * step - 2, step + 4, step + 4);
    context.lineWidth = 1; context.strokeStyle = "#000"; context.strokeRect(j * step - 3.5, i * step - 3.5, step + 7, step + 7);
  }
}
function cellAt(map, event) {
  const box = map.canvas.getBoundingClientRect();
  const place = (at, size) => Math.min(Math.max(Math.floor(at / size * count), 0), count - 1);
  return [place(event.clientY - box.top - map.canvas.clientTop, map.canvas.clientHeight), place(event.clientX - box.left - map.canvas.clientLeft, map.canvas.clientWidth)];
}
function point(cell, kept) {
  state.cell = cell; state.kept = kept;
  maps.forEach(overlay);
  read();
}
function pictured(i) {
  const open = make("button", { class: "pictured", type: "button", title: "Show its neighbours" }, picture(i), make("span", { text: `${className(i)} · ${images[i].name}` }));
  open.addEventListener("click", () => { choose(i); byId("images").scrollIntoView(); });
  return open;
}
function read() {
  const target = byId("reading");
  if (!state.cell) { target.replaceChildren(make("span", { class: "quiet", text: "No cell selected." })); return; }
  const [i, j] = state.cell, stage = stages[state.stage];
  const value = (name, text) => make("span", { class: "value quiet", "data-network": name, text: name }, make("b", { text }));
  const theirs = edge(stage, teacher, i, j), signed = (x) => (x > 0 ? "+" : x < 0 ? "−" : "") + Math.abs(x).toFixed(4);
  target.replaceChildren(pictured(i), pictured(j), value(teacher, theirs.toFixed(4)),
    ...students.flatMap((name) => [value(name, edge(stage, name, i, j).toFixed(4)), value(`${name} − teacher`, signed(edge(stage, name, i, j) - theirs))]),
    ...(state.kept ? [make("span", { class: "quiet", text: "pinned" })] : []));
}
function moveCell(event) {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const inside = (at) => Math.min(Math.max(at, 0), count - 1);
  if (event.key in steps) {
    const [i, j] = state.cell || [0, 0], [down, right] = steps[event.key];
    point([inside(i + down), inside(j + right)], false);
  } else if (event.key === "Enter" && state.cell) point(state.cell, !state.kept);
  else if (event.key === "Escape") point(null, false);
  else return;
  event.preventDefault();
}
function addMap(title, network, difference) {
  const canvas = make("canvas", { class: "map", tabindex: "0", role: "img", "aria-label": `${title}: matrix of ${count} by ${count} edges; arrow keys move between cells`, "data-map": title });
  const strip = make("canvas", { width: "256", height: "1", "aria-hidden": "true" });
  const map = { canvas, network, difference, low: make("span"), high: make("span") };
  const table = difference ? colours.difference : colours.edges, line = new ImageData(256, 1);
  for (let i = 0; i < 256; i++) line.data.set([table[3 * i], table[3 * i + 1], table[3 * i + 2], 255], 4 * i);
  strip.getContext("2d").putImageData(line, 0, 0);
  canvas.addEventListener("pointermove", (event) => { if (!state.kept) point(cellAt(map, event), false); });
  canvas.addEventListener("pointerleave", () => { if (!state.kept) point(null, false); });
  canvas.addEventListener("click", (event) => {
    const cell = cellAt(map, event), same = state.kept && String(cell) === String(state.cell);
    point(cell, !same);
  });
  canvas.addEventListener("keydown", moveCell);
  byId("maps").append(make("figure", {}, make("figcaption", { text: title }), canvas, make("div", { class: "key" }, map.low, strip, map.high)));
  maps.push(map);
}
function chooseStage(index) {
  state.stage = index;
  byId("stages").querySelectorAll("button").forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
  maps.forEach(paint);
  maps.forEach(overlay);
  read();
}
function buildEdges() {
  stages.forEach((stage, i) => {
    const button = make("button", { type: "button", text: stage.title });
    button.addEventListener("click", () => chooseStage(i));
    byId("stages").append(button);
  });
  [teacher, ...students].forEach((name) => addMap(name, name, false));
  students.forEach((name) => addMap(`${name} − teacher`, name, true));
  chooseStage(stages.length - (facts.stages.at(-1).name === "logits" && stages.length > 1 ? 2 : 1));
}

// --- images and neighbours ---

const tiles = [];
function buildGrid() {
  let group = null;
  images.forEach((image, i) => {
    if (!i || image.label !== images[i - 1].label) {
      group = make("div", { class: "class" }, make("h3", { text: className(i), title: className(i) }));
      byId("grid").append(group);
    }
    const tile = make("button", { type: "button", "data-image": i, tabindex: "-1", "aria-pressed": "false" }, picture(i));
    tile.addEventListener("click", () => choose(i));
    tile.addEventListener("keydown", (event) => walk(event, i));
    tiles.push(tile);
    group.append(tile);
  });
}
function walk(event, from) {
  const here = tiles[from].getBoundingClientRect();
  const vertical = (sign) => {
    const others = tiles.map((tile, i) => [tile.getBoundingClientRect(), i]).filter(([box]) => sign * (box.top - here.top) > 4);
    const far = ([box]) => 1000 * Math.abs(box.top - here.top) + Math.abs(box.left - here.left);
    return others.length ? others.reduce((best, other) => far(other) < far(best) ? other : best)[1] : from;
  };
  const targets = { ArrowRight: () => Math.min(from + 1, count - 1), ArrowLeft: () => Math.max(from - 1, 0), ArrowDown: () => vertical(1), ArrowUp: () => vertical(-1), Home: () => 0, End: () => count - 1 };
  if (!(event.key in targets)) return;
  event.preventDefault();
  const to = targets[event.key]();
  choose(to);
  tiles[to].focus();
}
function choose(i) {
  tiles[state.chosen].setAttribute("aria-pressed", "false");
  tiles[state.chosen].tabIndex = -1;
  state.chosen = i;
  tiles[i].setAttribute("aria-pressed", "true");
  tiles[i].tabIndex = 0;
  const grid = byId("grid"), box = tiles[i].getBoundingClientRect(), frame = grid.getBoundingClientRect();
  if (box.top < frame.top || box.bottom > frame.bottom) grid.scrollTop += box.top - frame.top - frame.height / 3;
  showNeighbours(i);
  bars.forEach(drawBars);
}
function showNeighbours(i) {
  const parts = [make("div", { class: "chosen" }, picture(i), make("div", {}, make("strong", { text: className(i) }), make("div", { class: "quiet", text: images[i].name })))];
  for (const stage of stages) {
    const near = Object.fromEntries([teacher, ...students].map((name) => [name, neighbours(stage, name, i)]));
    const common = students.map((name) => near[name].filter((j) => near[teacher].includes(j)));
    const said = students.map((name, n) => `${students.length > 1 ? name + " " : ""}${common[n].length} of ${near[teacher].length}`);
    parts.push(make("h3", { text: `${stage.title}: ${said.join(", ")} in common` }));
    for (const name of [teacher, ...students]) {
      const both = name === teacher ? common.flat() : common[students.indexOf(name)];
      parts.push(make("div", { class: "row", "data-stage": stage.title, "data-network": name }, make("span", { text: name }), make("div", { class: "near" }, ...near[name].map((j) => nearTile(stage, name, i, j, both.includes(j))))));
    }
  }
  byId("neighbours").replaceChildren(...parts);
}
function nearTile(stage, name, i, j, common) {
  const other = className(j) === className(i) ? "" : "other";
  const tile = make("button", { type: "button", "data-image": j, class: common ? "common" : "" }, picture(j), make("span", { class: other, text: className(j) }), make("span", { class: "quiet", text: edge(stage, name, i, j).toFixed(4) }));
  tile.addEventListener("click", () => { choose(j); tiles[j].focus({ preventScroll: true }); });
  return tile;
}

// --- transformations ---

function drawBars(bar) {
  const context = sized(bar.canvas), { width, height } = bar.canvas, step = width / count, middle = height / 2;
  for (const [name, colour, sign] of [[teacher, "--teacher", -1], [bar.student, "--student", 1]]) {
    words(bar.stage.moved, name).forEach((value, i) => {
      const length = value / data.levels * (middle - 2);
      context.fillStyle = style(i === state.chosen ? "--ink" : colour);
      context.fillRect(i * step, sign < 0 ? middle - length : middle, Math.max(step * 0.84, step > 2 ? 1 : step), length);
    });
  }
  context.fillStyle = style("--quiet");
  context.fillRect(0, middle, width, 1);
  for (const at of starts) if (4 * (starts.length + 1) <= Math.max(count, 8)) context.fillRect(at * step - 1, 0, 1, height);
  const value = (name) => (words(bar.stage.moved, name)[state.chosen] / data.levels).toFixed(4);
  bar.caption.textContent = `${bar.stage.title}, ${bar.student}. ${className(state.chosen)} ${images[state.chosen].name}: teacher ${value(teacher)}, student ${value(bar.student)}`;
}
function buildBars() {
  for (const stage of stages) for (const student of stage.moved ? students : []) {
    const canvas = make("canvas", { role: "img", "aria-label": `Transformation at ${stage.title} of teacher and ${student}` });
    const bar = { stage, student, canvas, caption: make("figcaption") };
    canvas.addEventListener("click", (event) => choose(Math.min(Math.floor(event.offsetX / canvas.clientWidth * count), count - 1)));
    byId("bars").append(make("figure", {}, bar.caption, canvas));
    bars.push(bar);
  }
  if (!bars.length) byId("transformations").hidden = true;
}

// --- start ---

const redraw = () => { maps.forEach(overlay); bars.forEach(drawBars); };
describe();
buildEdges();
buildGrid();
buildBars();
choose(0);
window.addEventListener("resize", redraw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
})();
