// The charts: curves, parameters against the probe, features in two dimensions.

// Points of a chart react to the pointer and to the arrow keys.
function interactive(host, svg, points, describe) {
  svg.setAttribute("tabindex", "0");
  const dot = make("circle", { r: 5, fill: "var(--page)", "stroke-width": 2.5, visibility: "hidden", "pointer-events": "none" });
  svg.append(dot);
  let at = null;
  function show(point, spoken) {
    at = point;
    if (!point) {
      dot.setAttribute("visibility", "hidden");
      say(host, null);
      return;
    }
    dot.setAttribute("cx", point.x);
    dot.setAttribute("cy", point.y);
    dot.setAttribute("stroke", colourOf(point.run));
    dot.setAttribute("visibility", "visible");
    const lines = describe(point);
    say(host, lines, point.x, point.y);
    if (spoken) by("spoken").textContent = lines.join(", ");
  }
  function nearest(event) {
    const box = svg.getBoundingClientRect();
    const factor = svg.viewBox.baseVal.width / box.width;
    const [x, y] = [(event.clientX - box.left) * factor, (event.clientY - box.top) * factor];
    let best = null, least = 60 ** 2;
    for (const point of points) {
      const away = (point.x - x) ** 2 + (point.y - y) ** 2;
      if (away < least) [best, least] = [point, away];
    }
    return best;
  }
  svg.addEventListener("pointermove", (event) => show(nearest(event), false));
  svg.addEventListener("pointerleave", () => show(null));
  svg.addEventListener("blur", () => show(null));
  svg.addEventListener("click", (event) => {
    const point = nearest(event);
    if (point) toggle(point.run);
  });
  svg.addEventListener("keydown", (event) => {
    const order = [...new Set(points.map((point) => point.run))].sort((a, b) => a - b);
    if (!order.length) return;
    const of = (run) => points.filter((point) => point.run === run);
    const run = at ? at.run : ([...state.chosen].find((index) => order.includes(index)) ?? order[0]);
    const mine = of(run);
    const place = at ? mine.indexOf(at) : mine.length - 1;
    if (event.key === "Enter") {
      if (at) toggle(at.run);
    } else if (event.key === "Escape") {
      show(null);
    } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const next = at ? place + (event.key === "ArrowLeft" ? -1 : 1) : place;
      show(mine[Math.max(0, Math.min(mine.length - 1, next))], true);
    } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      const next = order.indexOf(run) + (event.key === "ArrowUp" ? -1 : 1);
      const other = of(order[Math.max(0, Math.min(order.length - 1, next))]);
      const x = at ? at.x : Infinity;
      show(other.reduce((a, b) => (Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a)), true);
    } else {
      return;
    }
    event.preventDefault();
  });
}

// Curves

function curve(index, metric) {
  return runs[index].curves[metric === JUDGE ? `probe/${runs[index].judge}` : metric];
}

// Figures of an evaluation are single values: bars from 0, with the ends of their intervals.
const MOST_BARS = 40;

function drawBars(metric) {
  const last = (index, name) => runs[index].curves[name]?.[1].at(-1) ?? null;
  const all = [...state.shown].filter((index) => last(index, metric) !== null);
  const judged = all.sort((a, b) => last(b, metric) - last(a, metric)).slice(0, MOST_BARS);
  const host = by("curves");
  const row = 26, top = MARGIN.top, left = Math.min(260, host.clientWidth / 3);
  const height = top + row * Math.max(1, judged.length) + MARGIN.bottom;
  const [svg, width] = frame(host, height, `${labelled(metric)} of ${judged.length} runs`);
  const factor = unit(metric)[2];
  const most = Math.max(0, ...judged.flatMap((index) => [last(index, metric), last(index, `${metric}/high`) ?? 0]));
  const x = scale([0, most], left, width - MARGIN.right - 52, false, 0);
  const bottom = height - MARGIN.bottom;
  for (const value of ticks(0, most, 6)) {
    svg.append(make("line", { class: "rule", x1: x(value), x2: x(value), y1: top, y2: bottom }));
    svg.append(make("text", { x: x(value), y: bottom + 19, "text-anchor": "middle" }, tickText(value, factor)));
  }
  const left_out = all.length > judged.length ? `, best ${judged.length} of ${all.length}` : "";
  svg.append(make("text", { class: "name", x: (left + width - MARGIN.right) / 2, y: height - 8, "text-anchor": "middle" }, labelled(metric) + left_out));
  const points = [];
  judged.forEach((index, place) => {
    const y = top + row * (place + 0.5);
    const value = last(index, metric), low = last(index, `${metric}/low`), high = last(index, `${metric}/high`);
    svg.append(make("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, cut(runs[index].title, Math.floor(left / 7))));
    svg.append(make("rect", { x: x(0), y: y - 8, width: Math.max(0, x(value) - x(0)), height: 16, style: `fill:${colourOf(index)}`, class: emphasis(index).trim(), "data-run": index }));
    if (low !== null && high !== null) {
      svg.append(make("path", { class: "whisker", d: `M${x(low)} ${y}H${x(high)}M${x(low)} ${y - 4}v8M${x(high)} ${y - 4}v8` }));
    }
    svg.append(make("text", { x: x(Math.max(value, high ?? 0)) + 6, y: y + 4 }, withUnit(value, metric)));
    points.push({ x: x(value), y, run: index, value, low, high });
  });
  if (!judged.length) svg.append(make("text", { class: "name", x: width / 2, y: top + 16, "text-anchor": "middle" }, "none of these runs has this metric"));
  const said = (value) => withUnit(value, metric);
  interactive(host, svg, points, (point) => [
    `${point.run + 1}. ${runs[point.run].title}`,
    said(point.value) + (point.low === null ? "" : `, 95 % interval ${said(point.low)} to ${said(point.high)}`),
  ]);
}

function drawCurves() {
  const metric = by("metric").value;
  if (metric.startsWith("eval/") && data.metrics[metric]) {
    by("loss-note").textContent = "";
    drawBars(metric);
    return;
  }
  const log = by("log").checked;
  by("loss-note").textContent = metric === "loss" ? data.loss : "";
  const usable = (value) => value !== null && (!log || value > 0);
  const with_it = inDrawingOrder().filter((index) => curve(index, metric)?.[1].some(usable));
  const host = by("curves");
  const height = 420;
  const [svg, width] = frame(host, height, `${labelled(metric)} of ${with_it.length} runs against images seen`);
  const xs = [0], ys = [];
  for (const index of with_it) {
    const [seen, values] = curve(index, metric);
    xs.push(seen[seen.length - 1]);
    for (const value of values) if (usable(value)) ys.push(value);
  }
  const x = scale(xs, MARGIN.left, width - MARGIN.right, false, 0.02);
  const y = scale(ys, height - MARGIN.bottom, MARGIN.top, log);
  const factor = unit(metric)[2];
  axes(svg, width, height, x, y, "images seen", labelled(metric), ticks(0, x.high, width / 110).map((value) => [x(value), tickText(value)]), factor);
  if (!with_it.length) {
    const why = log ? "none of these runs has a positive value of it" : "none of these runs has this metric";
    svg.append(make("text", { class: "name", x: width / 2, y: height / 2, "text-anchor": "middle" }, why));
    return;
  }
  const points = [];
  for (const index of with_it) {
    const [seen, values] = curve(index, metric);
    let path = "", pen = "M";
    for (let n = 0; n < seen.length; n++) {
      if (!usable(values[n])) {
        pen = "M";
        continue;
      }
      const point = { x: x(seen[n]), y: y(values[n]), run: index, seen: seen[n], value: values[n] };
      path += `${pen}${point.x.toFixed(1)} ${point.y.toFixed(1)}`;
      pen = "L";
      points.push(point);
    }
    const style = `stroke:${colourOf(index)}`;
    svg.append(make("path", { d: path, class: `line${emphasis(index)}`, style, "data-run": index }));
    if (seen.length <= 24) {
      for (const point of points.filter((each) => each.run === index)) {
        svg.append(make("circle", { cx: point.x, cy: point.y, r: 3, style: `fill:${colourOf(index)}`, class: emphasis(index).trim() }));
      }
    }
  }
  interactive(host, svg, points, (point) => [
    `${point.run + 1}. ${runs[point.run].title}`,
    `${withUnit(point.value, metric)} after ${point.seen.toLocaleString("en")} images`,
  ]);
}

function drawKey() {
  const host = by("key");
  host.replaceChildren();
  function entry(colour, text) {
    const part = document.createElement("span");
    const swatch = document.createElement("i");
    swatch.className = "swatch";
    swatch.style.background = colour;
    part.append(swatch, text);
    host.append(part);
  }
  if (state.colourBy) {
    const values = distinct(state.colourBy);
    for (const value of values.length > 20 ? [values[0], values[values.length - 1]] : values) {
      entry(colourOf(data.varied[state.colourBy].indexOf(value)), `${state.colourBy} ${shown(value)}`);
    }
    return;
  }
  const coloured = (index) => placeOf[index] < COLOURS;
  for (const index of [...state.shown].filter(coloured)) entry(colourOf(index), `${index + 1}. ${runs[index].title}`);
  const others = [...state.shown].filter((index) => !coloured(index)).length;
  if (others) entry("var(--rest)", `${others} more`);
}

// Parameters against the probe

function judged(indices) {
  const names = new Set(indices.map((index) => runs[index].judge));
  return names.size === 1 ? `probe/${[...names][0]}` : JUDGE;
}

function axisOf(name, from, to, indices) {
  const values = indices.map((index) => data.varied[name][index]);
  if (isNumeric(name) && values.every((value) => value !== null)) {
    const low = Math.min(...values), high = Math.max(...values);
    const log = low > 0 && high / low >= 20;
    const place = scale(values, from, to, log, 0.06);
    const few = [...new Set(values)].sort((a, b) => a - b);
    place.marks = (few.length <= 8 ? few : place.ticks(6)).map((value) => [place(value), tickText(value)]);
    place.note = log ? ", logarithmic" : "";
    return place;
  }
  const each = distinct(name).filter((value) => values.includes(value));
  const place = (value) => from + ((each.indexOf(value) + 0.5) / each.length) * (to - from);
  const sparse = Math.ceil(each.length / 12);
  place.marks = each.filter((_, n) => n % sparse === 0).map((value) => [place(value), cut(shown(value), 18)]);
  place.note = "";
  return place;
}

function drawScatter() {
  const name = by("parameter").value;
  if (!name) return;
  const host = by("scatter");
  const height = 340;
  const probed = inDrawingOrder().filter((index) => runs[index].score !== null);
  // Runs of methods without the parameter are left out.
  const indices = probed.filter((index) => data.varied[name][index] !== null);
  const without = probed.length - indices.length;
  const metric = judged(indices);
  by("scatter-note").textContent = without ? `${without} ${without > 1 ? "runs have" : "run has"} no such parameter and ${without > 1 ? "are" : "is"} not shown.` : "";
  const [svg, width] = frame(host, height, `${labelled(metric)} of ${indices.length} runs against ${name}`);
  const y = scale(indices.map((index) => runs[index].score), height - MARGIN.bottom, MARGIN.top, false, 0.08);
  const x = axisOf(name, MARGIN.left, width - MARGIN.right, indices);
  const room = width / 60;
  const marks = x.marks.filter((_, n) => n % Math.ceil(x.marks.length / room) === 0);
  axes(svg, width, height, x, y, name + x.note, labelled(metric), marks, 100);
  const groups = new Map();
  for (const index of indices) {
    const value = data.varied[name][index];
    groups.set(value, [...(groups.get(value) ?? []), runs[index].score]);
  }
  if (groups.size < indices.length && groups.size > 1) {
    const means = [...groups].map(([value, scores]) => [x(value), y(scores.reduce((a, b) => a + b) / scores.length)]);
    means.sort((a, b) => a[0] - b[0]);
    svg.append(make("path", { class: "mean", d: means.map(([px, py], n) => `${n ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("") }));
    svg.append(make("text", { x: width - MARGIN.right, y: MARGIN.top - 2, "text-anchor": "end" }, "dashed: mean of the runs at a value"));
  }
  const points = [];
  for (const index of indices) {
    const point = { x: x(data.varied[name][index]), y: y(runs[index].score), run: index };
    points.push(point);
    svg.append(make("circle", { cx: point.x, cy: point.y, r: 6, style: `fill:${colourOf(index)};stroke:var(--page)`, class: emphasis(index).trim() }));
  }
  interactive(host, svg, points, (point) => [
    `${point.run + 1}. ${runs[point.run].title}`,
    `${name} ${shown(data.varied[name][point.run])}: ${withUnit(runs[point.run].score, metric)}`,
  ]);
}

function drawParallel() {
  const host = by("parallel");
  const names = Object.keys(data.varied).filter((name) => distinct(name).length > 1).slice(0, 9);
  if (names.length < 2 || runs.length < 3) return;
  const height = 340;
  const indices = inDrawingOrder().filter((index) => runs[index].score !== null);
  const metric = judged(indices);
  const [svg, width] = frame(host, height, `${indices.length} runs over ${names.join(", ")} and ${labelled(metric)}`);
  const [top, bottom] = [44, height - 16];
  const gap = (width - 130) / names.length;
  const columns = names.map((name, n) => ({ name, x: 60 + n * gap, y: axisOf(name, bottom, top, indices), of: (index) => data.varied[name][index] }));
  const last = scale(indices.map((index) => runs[index].score), bottom, top, false, 0.06);
  last.marks = last.ticks(6).map((value) => [last(value), tickText(value, 100)]);
  last.note = "";
  columns.push({ name: metric === JUDGE ? "judging probe (%)" : labelled(metric), x: 60 + names.length * gap, y: last, of: (index) => runs[index].score });
  const points = [];
  for (const index of indices) {
    const mine = columns.map((column) => ({ x: column.x, y: column.y(column.of(index)), run: index, column }));
    points.push(...mine);
    const d = mine.map((p, n) => `${n ? "L" : "M"}${p.x.toFixed(1)} ${p.y.toFixed(1)}`).join("");
    svg.append(make("path", { d, class: `line${emphasis(index)}`, style: `stroke:${colourOf(index)}`, "data-run": index }));
  }
  columns.forEach((column, n) => {
    svg.append(make("line", { class: "rule", x1: column.x, x2: column.x, y1: top, y2: bottom, style: "stroke:var(--muted)" }));
    const short = column.name.split(".").slice(-2).join(".");
    // Names of neighbouring axes alternate between two lines and are cut, so that they do not overlap.
    const letters = Math.floor((gap * (n && n < columns.length - 1 ? 1.8 : 1.3)) / 7.5);
    const heading = make("text", { class: "name", x: column.x, y: n % 2 ? 30 : 14, "text-anchor": n === columns.length - 1 ? "end" : n ? "middle" : "start" }, cut(short + column.y.note, letters));
    heading.append(make("title", {}, column.name));
    svg.append(heading);
    for (const [place, text] of column.y.marks) svg.append(make("text", { x: column.x + 6, y: place + 4, style: "paint-order:stroke;stroke:var(--page);stroke-width:5px;stroke-linejoin:round" }, text));
  });
  interactive(host, svg, points, (point) => [
    `${point.run + 1}. ${runs[point.run].title}`,
    ...columns.slice(0, -1).map((column) => `${column.name} ${shown(column.of(point.run))}`),
    withUnit(runs[point.run].score, metric),
  ]);
}

// Features in two dimensions

const maps = Object.entries(data.maps).map(([index, map]) => ({ index: Number(index), ...map }));

function classOf(map, n) {
  const label = map.labels[n];
  return label < 0 ? "no label" : map.names[label] ?? String(label);
}

function classes() {
  const counts = new Map();
  for (const map of maps) map.labels.forEach((_, n) => counts.set(classOf(map, n), (counts.get(classOf(map, n)) ?? 0) + 1));
  return [...counts].sort(([a, x], [b, y]) => y - x || a.localeCompare(b, "en", { numeric: true })).map(([name]) => name);
}

function drawMaps() {
  by("maps-section").hidden = !maps.length;
  if (!maps.length) return;
  const order = classes();
  const colour = (name) => (order.indexOf(name) < COLOURS && name !== "no label" ? `var(--c${order.indexOf(name)})` : "var(--rest)");
  const only = by("class").value;
  by("maps").replaceChildren();
  const hosts = [];
  for (const map of maps.filter((each) => state.shown.has(each.index))) {
    const points = map.maps[by("map").value] ?? Object.values(map.maps).pop();
    const box = document.createElement("div");
    box.className = "map";
    const title = document.createElement("strong");
    title.textContent = `${map.index + 1}. ${runs[map.index].title}`;
    const host = document.createElement("div");
    host.className = "chart";
    box.append(title, host);
    by("maps").append(box);
    hosts.push([host, map, points]);
  }
  // All boxes must exist before the first is measured.
  for (const [host, map, points] of hosts) drawMap(host, map, points, colour, only);
  const key = by("map-key");
  key.replaceChildren();
  for (const name of order.slice(0, 40)) {
    const part = document.createElement("span");
    const swatch = document.createElement("i");
    swatch.className = "swatch";
    swatch.style.background = colour(name);
    part.append(swatch, name);
    key.append(part);
  }
}

function drawMap(host, map, points, colour, only) {
  const height = 420;
  const [svg, width] = frame(host, height, `${points.length} test images by their features`);
  const largest = Math.max(...points.flat().map(Math.abs), 1e-9) * 1.05;
  const side = Math.min(width, height) / 2;
  const place = ([x, y]) => [width / 2 + (x / largest) * side, height / 2 - (y / largest) * side];
  points.forEach((point, n) => {
    const [cx, cy] = place(point);
    const name = classOf(map, n);
    const dim = only && name !== only ? "dim" : "";
    svg.append(make("circle", { cx, cy, r: 4, style: `fill:${colour(name)};stroke:var(--page)`, class: dim }));
  });
  const readout = document.createElement("div");
  readout.className = "readout";
  readout.hidden = true;
  const picture = document.createElement("div");
  picture.className = "thumbnail";
  picture.style.backgroundImage = `url("${map.sheet}")`;
  picture.style.backgroundSize = `${80 * map.across}px auto`;
  const text = document.createElement("div");
  readout.append(picture, text);
  host.append(readout);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let nearest = -1, least = 400;
    points.forEach((point, n) => {
      const [px, py] = place(point);
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least && (!only || classOf(map, n) === only)) [nearest, least] = [n, distance];
    });
    readout.hidden = nearest < 0;
    if (nearest < 0) return;
    picture.style.backgroundPosition = `-${80 * (nearest % map.across)}px -${80 * Math.floor(nearest / map.across)}px`;
    text.textContent = classOf(map, nearest);
    readout.style.left = `${Math.min(x + 14, width - 110)}px`;
    readout.style.top = `${Math.max(0, Math.min(y - 40, height - 120))}px`;
  });
  svg.addEventListener("pointerleave", () => (readout.hidden = true));
}
