"use strict";
(() => {
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

  function drawCurves() {
    const metric = by("metric").value;
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

  // The tables

  function rows() {
    return [...document.querySelectorAll("#ranking tbody tr")];
  }

  function sortBy(head) {
    const column = [...head.parentElement.children].indexOf(head);
    const descending = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.children) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const value = (row) => {
      const cell = row.children[column];
      if (cell.dataset.sort !== undefined) return cell.classList.contains("number") ? Number(cell.dataset.sort) : cell.dataset.sort;
      const text = cell.textContent.trim();
      return text === "-" ? null : text;
    };
    const sorted = rows().map((row) => [value(row), row]).sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // what is missing stays last
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
      return descending ? -order : order;
    });
    document.querySelector("#ranking tbody").append(...sorted.map(([, row]) => row));
  }

  function toggle(index) {
    if (!state.chosen.delete(index)) state.chosen.add(index);
    refresh();
  }

  function filter() {
    const words = by("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    state.shown.clear();
    for (const row of rows()) {
      const index = Number(row.dataset.run);
      const names = Object.entries(data.varied).map(([name, values]) => `${name} ${shown(values[index])}`);
      const text = `${row.textContent} ${runs[index].name} ${names.join(" ")}`.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      if (!row.hidden) state.shown.add(index);
    }
    by("count").textContent = words.length ? `${state.shown.size} of ${runs.length} runs` : "";
    refresh();
  }

  function showPictures() {
    const kind = by("kind")?.value;
    for (const figure of document.querySelectorAll("figure")) {
      const index = Number(figure.dataset.run);
      figure.hidden = figure.dataset.kind !== kind || !state.shown.has(index);
      figure.classList.toggle("chosen", state.chosen.has(index));
    }
  }

  // One picture in a dialog, as large as the window; a click shows it at full resolution.

  const CHARTS = new Set(["embedding", "curves"]);
  let zoomed = null;

  function zoom(figure) {
    zoomed = figure;
    const from = figure.querySelector("img");
    const to = by("zoom-image");
    to.src = from.src;
    to.alt = from.alt;
    to.className = "";
    if (from.dataset.chart === undefined) delete to.dataset.chart;
    else to.dataset.chart = "";
    by("zoom-title").textContent = figure.querySelector("figcaption").textContent;
    if (!by("zoom").open) by("zoom").showModal();
  }

  function zoomNext(step) {
    const seen = [...document.querySelectorAll("figure")].filter((figure) => !figure.hidden && figure.querySelector("img"));
    zoom(seen[(seen.indexOf(zoomed) + step + seen.length) % seen.length]);
  }

  function showMore() {
    const table = document.querySelector("#ranking").parentElement;
    by("more-runs").classList.toggle("needed", table.scrollWidth > table.clientWidth + 1);
  }

  function refresh() {
    by("clear").hidden = !state.chosen.size;
    for (const button of document.querySelectorAll(".pick")) {
      const index = Number(button.dataset.run);
      button.setAttribute("aria-pressed", state.chosen.has(index));
      button.querySelector(".swatch").style.background = colourOf(index);
    }
    for (const cell of document.querySelectorAll("#parameters [data-run]")) cell.hidden = !state.shown.has(Number(cell.dataset.run));
    draw();
    showPictures();
  }

  function draw() {
    drawCurves();
    drawKey();
    drawScatter();
    drawParallel();
    drawMaps();
  }

  // Start

  const metrics = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].sort();
  const judges = new Set(runs.filter((run) => run.score !== null).map((run) => run.judge));
  if (judges.size > 1) by("metric").append(option(JUDGE));
  const groups = new Map();
  for (const metric of metrics) {
    const group = metric.includes("/") ? metric.split("/")[0] : "training";
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(metric);
  }
  for (const group of [...groups.keys()].sort((a, b) => ["probe", "training"].indexOf(b) - ["probe", "training"].indexOf(a) || a.localeCompare(b))) {
    const element = document.createElement("optgroup");
    element.label = group;
    element.append(...groups.get(group).map((metric) => option(metric)));
    by("metric").append(element);
  }
  by("metric").value = judges.size > 1 ? JUDGE : judges.size ? `probe/${[...judges][0]}` : metrics.includes("loss") ? "loss" : metrics[0] ?? "";

  const varied = Object.keys(data.varied);
  by("colour").append(option("", "rank"), ...varied.map((name) => option(name)));
  const scored = runs.some((run) => run.score !== null);
  const telling = varied.filter((name) => distinct(name).length > 1);
  by("parameter").append(...telling.map((name) => option(name)));
  by("parameter").value = telling.find((name) => name !== "seed") ?? telling[0] ?? "";
  by("scatter-section").hidden = !telling.length || !scored;
  by("parallel-section").hidden = telling.length < 2 || runs.length < 3 || !scored;
  const of_recipes = [...document.querySelectorAll("#parameters .of-recipe")];
  by("recipes-line").hidden = !of_recipes.length;

  function showRecipes() {
    const all = by("recipes").checked;
    for (const row of of_recipes) row.hidden = !all;
  }

  const mapNames = [...new Set(maps.flatMap((map) => Object.keys(map.maps)))];
  by("map").append(option("", "after pretraining"), ...mapNames.map((name) => option(name)));
  by("class").append(option("", "all"), ...classes().map((name) => option(name)));
  by("map").addEventListener("change", drawMaps);
  by("class").addEventListener("change", drawMaps);
  by("metric").addEventListener("change", drawCurves);
  by("log").addEventListener("change", drawCurves);
  by("colour").addEventListener("change", () => {
    state.colourBy = by("colour").value;
    refresh();
  });
  by("parameter").addEventListener("change", drawScatter);
  by("filter").addEventListener("input", filter);
  by("recipes").addEventListener("change", showRecipes);
  by("clear").addEventListener("click", () => {
    state.chosen.clear();
    refresh();
  });
  by("kind")?.addEventListener("change", showPictures);
  for (const head of document.querySelectorAll("#ranking thead th")) head.querySelector("button").addEventListener("click", () => sortBy(head));
  for (const button of document.querySelectorAll(".pick")) button.addEventListener("click", () => toggle(Number(button.dataset.run)));
  for (const image of document.querySelectorAll("figure img")) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `larger: ${image.alt}`);
    if (CHARTS.has(image.closest("figure").dataset.kind)) image.dataset.chart = "";
    image.replaceWith(button);
    button.append(image);
    button.addEventListener("click", () => zoom(button.closest("figure")));
  }
  let resized = 0;
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    cancelAnimationFrame(resized);
    resized = requestAnimationFrame(() => {
      draw();
      showMore();
    });
  });
  by("before").addEventListener("click", () => zoomNext(-1));
  by("after").addEventListener("click", () => zoomNext(1));
  by("zoom-image").addEventListener("click", () => by("zoom-image").classList.toggle("whole"));
  by("zoom").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") zoomNext(-1);
    if (event.key === "ArrowRight") zoomNext(1);
  });
  // If no run is selected, show all rows instead of an empty table.
  by("recipes").checked = of_recipes.length > 0 && !document.querySelector("#parameters tbody tr:not(.of-recipe)");
  showMore();
  showRecipes();
  refresh();
})();
