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
