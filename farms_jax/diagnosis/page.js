"use strict";
const table = document.querySelector(".layers table");
const bodies = [...table.tBodies];
const search = document.getElementById("find");
const choice = document.getElementById("status");
const cards = [...document.querySelectorAll("[data-status]")];

function shown() {
  return bodies.filter((body) => !body.hidden);
}

function filter() {
  const part = search.value.toLowerCase();
  for (const body of bodies) {
    const name = body.rows[0].cells[0].textContent.toLowerCase();
    body.hidden = !name.includes(part) || (choice.value !== "" && body.dataset.s !== choice.value);
  }
  const chosen = choice.value === "" ? "" : choice.selectedOptions[0].text;
  cards.forEach((card) => card.setAttribute("aria-pressed", String(card.dataset.status === chosen)));
  document.getElementById("count").value = `${shown().length} of ${bodies.length} layers`;
}

function setOpen(body, yes) {
  body.classList.toggle("o", yes);
  body.rows[0].querySelector("button").setAttribute("aria-expanded", String(yes));
}

// Numbers by size, other texts in natural order; layers without a value stay at the end either way.
function compare(a, b, sign) {
  if (a === "–" || b === "–") return (a === "–") - (b === "–");
  return sign * (parseFloat(a) - parseFloat(b) || a.localeCompare(b, "en", { numeric: true }));
}

// One click sorts up, the next down, the third brings the order of the network back.
function sort(head) {
  const order = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
  table.querySelectorAll("[aria-sort]").forEach((other) => other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", order);
  const keyed = bodies.map((body) => [body.rows[0].cells[head.cellIndex].textContent, body]);
  if (order !== "none") keyed.sort((a, b) => compare(a[0], b[0], order === "ascending" ? 1 : -1));
  table.append(...keyed.map(([, body]) => body));
}

function follow() {
  const body = document.getElementById(location.hash.slice(1));
  if (!bodies.includes(body)) return;
  if (body.hidden) {
    search.value = choice.value = "";
    filter();
  }
  setOpen(body, true);
  body.scrollIntoView({ block: "center" });
}

table.tHead.addEventListener("click", (event) => {
  const head = event.target.closest("[aria-sort]");
  if (head) sort(head);
});
table.addEventListener("click", (event) => {
  const body = event.target.closest("tbody");
  if (body && event.target.closest("th")) setOpen(body, !body.classList.contains("o"));
});
cards.forEach((card) =>
  card.addEventListener("click", () => {
    const option = [...choice.options].find((one) => one.text === card.dataset.status);
    choice.value = option && !option.selected ? option.value : "";
    filter();
  }),
);
search.addEventListener("input", filter);
choice.addEventListener("change", filter);
document.getElementById("all").addEventListener("change", (event) => table.classList.toggle("all", event.target.checked));
document.getElementById("open").addEventListener("click", () => {
  const some = shown();
  const yes = !some.every((body) => body.classList.contains("o"));
  some.forEach((body) => setOpen(body, yes));
});
addEventListener("hashchange", follow);
filter();
follow();
