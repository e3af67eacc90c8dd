// What all parts of the page share: the runs, numbers in words, elements, colours and scales.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const by = (id) => document.getElementById(id);
const COLOURS = 10;
const JUDGE = "the judging probe";
const MARGIN = { left: 66, right: 18, top: 14, bottom: 46 };

// The best runs have their own colours, alternating between the judging probes.
const placeOf = [];
data.featured.forEach((index, place) => (placeOf[index] = place));

const state = {
  shown: new Set(runs.keys()),
  chosen: new Set(),
  colourBy: "",
};

// [what a metric is called, its unit, the factor by which it is shown]
function unit(metric) {
  if (metric === JUDGE) return ["accuracy by the judging probe", "%", 100];
  const known = data.metrics[metric];
  if (known) return [known.title, known.unit, known.unit === "%" ? 100 : 1];
  return /^probe\/.*(knn|linear)$/.test(metric) ? [metric, "%", 100] : [metric, "", 1];
}

function number(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "not finite";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e7)) return value.toExponential(2);
  return Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 6 });
}

function withUnit(value, metric) {
  const [, name, scale] = unit(metric);
  const text = scale === 100 ? (100 * value).toFixed(1) : number(value);
  return name === "%" ? `${text} %` : name ? `${text} ${name}` : text;
}

function shown(value) {
  if (value === null || value === undefined) return "absent";
  return typeof value === "number" ? String(Number(value.toPrecision(6))) : String(value);
}

function cut(text, most) {
  return text.length > most ? `${text.slice(0, Math.max(1, most - 1))}\u2026` : text;
}

// Elements. Texts are inserted as text, never as markup: a run may have any name.

function make(name, attributes = {}, text = null) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  return element;
}

function option(value, text = value) {
  const element = document.createElement("option");
  element.value = value;
  element.textContent = text;
  return element;
}

// Colours

const STEPS = ["--c0", "--c5", "--c2", "--c6", "--c3"];

function isNumeric(name) {
  const values = data.varied[name].filter((value) => value !== null);
  return values.length > 1 && values.every((value) => typeof value === "number");
}

function distinct(name) {
  const values = [...new Set(data.varied[name].map((value) => (value === null ? null : value)))];
  return values.sort((a, b) => (typeof a === "number" && typeof b === "number" ? a - b : shown(a).localeCompare(shown(b), "en", { numeric: true })));
}

function colourOf(index) {
  if (!state.colourBy) return placeOf[index] < COLOURS ? `var(--c${placeOf[index]})` : "var(--rest)";
  const values = distinct(state.colourBy);
  const place = values.indexOf(data.varied[state.colourBy][index]);
  if (!isNumeric(state.colourBy)) return place < COLOURS ? `var(--c${place})` : "var(--rest)";
  if (data.varied[state.colourBy][index] === null) return "var(--rest)";
  const numbers = values.filter((value) => value !== null);
  const at = numbers.length < 2 ? 0 : (numbers.indexOf(data.varied[state.colourBy][index]) / (numbers.length - 1)) * (STEPS.length - 1);
  const low = Math.min(Math.floor(at), STEPS.length - 2);
  return `color-mix(in oklab, var(${STEPS[low]}) ${Math.round(100 * (1 - at + low))}%, var(${STEPS[low + 1]}))`;
}

// Scales

function ticks(low, high, most) {
  if (!(high > low)) return [low];
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n <= Math.floor(high / step + 1e-9); n++) found.push(n * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const factor of [1, 2, 5]) found.push(factor * 10 ** power);
  }
  const inside = found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
  return inside.length >= 2 && inside.length <= 9 ? inside : inside.filter((v) => /^1/.test(v.toExponential())).concat(inside.length < 2 ? [low, high] : []);
}

function scale(values, from, to, log, pad = 0.04) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low === Infinity) [low, high] = [log ? 0.1 : 0, 1];
  const lift = log ? Math.log10 : (value) => value;
  let [a, b] = [lift(low), lift(high)];
  if (a === b) [a, b] = [a - (Math.abs(a) * 0.05 || 0.5), b + (Math.abs(b) * 0.05 || 0.5)];
  const room = (b - a) * pad;
  [a, b] = [a - room, b + room];
  const place = (value) => from + ((lift(value) - a) / (b - a)) * (to - from);
  place.low = log ? 10 ** a : a;
  place.high = log ? 10 ** b : b;
  place.ticks = (most) => (log ? logTicks(place.low, place.high) : ticks(a, b, most));
  return place;
}

function tickText(value, factor = 1) {
  const scaled = value * factor;
  if (Math.abs(scaled) >= 1e6) return `${Number((scaled / 1e6).toPrecision(3))} M`;
  if (Math.abs(scaled) >= 1e4) return `${Number((scaled / 1e3).toPrecision(3))} k`;
  if (scaled !== 0 && Math.abs(scaled) < 1e-3) return scaled.toExponential(0);
  return String(Number(scaled.toPrecision(4)));
}

function frame(host, height, label) {
  const width = Math.max(300, host.clientWidth);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
  host.replaceChildren(svg);
  return [svg, width];
}

function axes(svg, width, height, x, y, xLabel, yLabel, xTicks, yFactor = 1) {
  const bottom = height - MARGIN.bottom;
  for (const value of y.ticks(6)) {
    svg.append(make("line", { class: "rule", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
    svg.append(make("text", { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, tickText(value, yFactor)));
  }
  for (const [place, text] of xTicks) {
    svg.append(make("line", { class: "rule", x1: place, x2: place, y1: bottom, y2: bottom + 5 }));
    svg.append(make("text", { x: place, y: bottom + 19, "text-anchor": "middle" }, text));
  }
  svg.append(make("line", { class: "rule", x1: MARGIN.left, x2: width - MARGIN.right, y1: bottom, y2: bottom }));
  svg.append(make("text", { class: "name", x: (MARGIN.left + width - MARGIN.right) / 2, y: height - 8, "text-anchor": "middle" }, xLabel));
  const middle = (MARGIN.top + bottom) / 2;
  svg.append(make("text", { class: "name", x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }, yLabel));
}

function labelled(metric) {
  const [name, of] = unit(metric);
  return of ? `${name} (${of})` : name;
}

const CROWD = 30;

function emphasis(index) {
  if (!state.chosen.size) return state.shown.size > CROWD ? " crowd" : "";
  return state.chosen.has(index) ? " strong" : " dim";
}

function inDrawingOrder() {
  // The best and highlighted runs are drawn on top.
  return [...state.shown].sort((a, b) => state.chosen.has(a) - state.chosen.has(b) || b - a);
}

function say(host, lines, left, top) {
  host.querySelector(".readout")?.remove();
  if (!lines) return;
  const box = document.createElement("div");
  box.className = "readout";
  for (const line of lines) {
    const part = document.createElement("div");
    part.textContent = line;
    box.append(part);
  }
  host.append(box);
  const room = host.clientWidth - box.offsetWidth;
  box.style.left = `${Math.max(0, Math.min(room, left + 14))}px`;
  box.style.top = `${Math.max(0, top - box.offsetHeight - 10)}px`;
}
