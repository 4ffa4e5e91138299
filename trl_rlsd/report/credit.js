"use strict";
const page = document.documentElement;
const readout = document.getElementById("readout");
const number = (text, digits) => (text === "" ? null : Number(text).toFixed(digits));
const signed = (text, digits) => (Number(text) >= 0 ? "+" : "") + number(text, digits);

function words(token) {
  const data = token.dataset;
  const parts = [`token ${Number(data.i) + 1}`, JSON.stringify(token.querySelector(".x").textContent)];
  if (data.counts === "0") return parts.concat("not counted: it was not sampled by the model").join(" · ");
  if (data.gain === "") parts.push("not scored by the teacher");
  else parts.push(`gain ${signed(data.gain, 3)} nats`);
  if (data.weight !== "") {
    const clip = { low: ", raised to the lower bound", high: ", cut to the upper bound", "": "" }[data.clip];
    parts.push(`weight ${number(data.weight, 3)}${clip}`);
  }
  const times = data.times === "" ? "" : `, ${data.times} times A`;
  return parts.concat(`credit ${signed(data.credit, 4)}${times}`).join(" · ");
}

let marked = null;
function show(token) {
  if (marked) marked.classList.remove("here");
  marked = token;
  token.classList.add("here");
  readout.textContent = words(token);
}

for (const list of document.querySelectorAll(".tokens")) {
  const tokens = [...list.querySelectorAll(".t")];
  list.addEventListener("pointerover", (event) => {
    const token = event.target.closest(".t");
    if (token) show(token);
  });
  list.addEventListener("focusin", (event) => show(event.target.closest(".t")));
  list.addEventListener("keydown", (event) => {
    const at = tokens.indexOf(event.target.closest(".t"));
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (to === undefined || !tokens[to]) return;
    event.preventDefault();
    tokens[at].tabIndex = -1;
    tokens[to].tabIndex = 0;
    tokens[to].focus();
  });
}

for (const button of document.querySelectorAll("[data-jump]")) {
  button.addEventListener("click", () => {
    const [list, index] = button.dataset.jump.split(":");
    const token = document.getElementById(list).querySelector(`[data-i="${index}"]`);
    token.focus();
  });
}

for (const choice of document.querySelectorAll("input[name=shade]")) {
  choice.addEventListener("change", () => page.setAttribute("data-shade", choice.value));
}

document.getElementById("theme").addEventListener("click", () => {
  const dark = page.dataset.theme ? page.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  page.dataset.theme = dark ? "light" : "dark";
});
