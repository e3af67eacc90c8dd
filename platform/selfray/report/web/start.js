function draw() {
  drawCurves();
  drawKey();
  drawScatter();
  drawParallel();
  drawMaps();
}

// Start

// The ends of an interval are drawn with its figure.
const is_end = (metric) => /\/(low|high)$/.test(metric) && data.metrics[metric.replace(/\/(low|high)$/, "")];
const metrics = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].filter((metric) => !is_end(metric)).sort();
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
