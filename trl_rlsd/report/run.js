"use strict";
// Draws the figures as they come into view, in the colours of the page's scheme; one legend for all of them.
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new Set();

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  const axis = { color: of("--soft"), gridcolor: of("--line"), linecolor: of("--line") };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: of("--ink"), family: "system-ui, sans-serif", size: 12 },
    hoverlabel: { bgcolor: of("--page"), bordercolor: of("--line"), font: { color: of("--ink") }, namelength: 40 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: of("--soft"), activecolor: of("--ink") }, axis,
  };
}

function themed(layout) {
  const { axis, ...rest } = colours();
  const one = { ...layout, ...rest };
  for (const name of ["xaxis", "yaxis"]) one[name] = { ...layout[name], ...axis };
  return one;
}

function shown(group) {
  return document.querySelector(`input[value="${group}"]`).checked;
}

function draw(place) {
  const { data, layout } = figures[place.dataset.figure];
  for (const trace of data) trace.visible = shown(trace.legendgroup);
  drawn.add(place);
  Plotly.newPlot(place, data, themed(layout), {
    responsive: true,
    displaylogo: false,
    // plotly's own set has a button that uploads the data to its makers
    showSendToCloud: false,
    modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]],
  });
}

const watcher = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    watcher.unobserve(target);
    draw(target);
  }
}, { rootMargin: "600px" });
const places = document.querySelectorAll("[data-figure]");
places.forEach((place) => watcher.observe(place));

document.getElementById("runs").addEventListener("change", ({ target }) => {
  for (const place of drawn) {
    const own = place.data.flatMap((trace, i) => (trace.legendgroup === target.value ? [i] : []));
    if (own.length) Plotly.restyle(place, { visible: target.checked }, own);
  }
});

dark.addEventListener("change", () => {
  for (const place of drawn) Plotly.react(place, place.data, themed(place.layout));
});

// the arrow keys do what the pointer does
for (const place of places) {
  place.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || !drawn.has(place)) return;
    const curve = place.data.findIndex((trace) => trace.visible && trace.hoverinfo !== "skip");
    if (curve < 0) return;
    event.preventDefault();
    const last = place.data[curve].x.length - 1;
    const from = place.cursor ?? (moves[event.key] > 0 ? -1 : last + 1);
    place.cursor = Math.max(0, Math.min(last, from + moves[event.key]));
    Plotly.Fx.hover(place, { xval: place.data[curve].x[place.cursor] }, "xy");
  });
  place.addEventListener("blur", () => drawn.has(place) && Plotly.Fx.unhover(place));
}
