(() => {
"use strict";
/* Tables whose rows are made on demand: sorted by a click on a head, searched, a hundred at a time. */
const PAGE = 100;
const MINUS = "\u2212", DASH = "\u2013";
const SYMBOLS = { ok: "\u2713", failed: "\u2715", skipped: DASH };

function node(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shown(value, column) {
  let text = column.decimals === undefined ? String(Number(value.toPrecision(column.digits))) : value.toFixed(column.decimals);
  if (Math.abs(value) >= 1e6 && column.decimals === undefined && !Number.isInteger(value)) text = value.toExponential(column.digits - 1);
  return text.replace(/-/g, MINUS);
}

function withError(value, error) {
  if (!(error > 0)) return shown(value, { digits: 6 });
  const decimals = Math.min(9, Math.max(0, 1 - Math.floor(Math.log10(error))));
  return `${value.toFixed(decimals)} \u00b1 ${error.toFixed(decimals)}`.replace(/-/g, MINUS);
}

function badges(value, column) {
  const known = column.bits.filter(([bit]) => value & bit).map(([, name, title]) => [name, title]);
  const left = column.bits.reduce((rest, [bit]) => rest & ~bit, value);
  if (left) known.push([`bits ${left}`, "unknown bits"]);
  return known.map(([name, title]) => column.anchors
    ? node("a", { class: "flag", href: `#flag-${name}`, title }, name) : node("span", { class: "flag", title }, name));
}

/* As wide as the longest text, from `least` to `most` characters, but for a share of the window: the rest wraps. */
function width(column, least, most, share) {
  column.width ??= column.texts.reduce((w, text) => Math.min(most, Math.max(w, text.length)), least);
  return `min-width: min(calc(${column.width + 1}ch + 20px), ${share}vw)`;
}

const CELLS = {
  number(column, i) {
    const value = column.values[i];
    if (value === null) return node("td", { class: "number" }, DASH);
    return node("td", { class: "number" }, column.errors ? withError(value, column.errors[i]) : shown(value, column));
  },
  text: (column, i) => node("td", {}, column.texts[column.values[i]]),
  status(column, i) {
    const text = column.texts[column.values[i]], known = text in SYMBOLS ? text : "failed";
    return node("td", {}, node("span", { class: `status ${known}` }, `${SYMBOLS[known]} ${text || "no status"}`));
  },
  flags: (column, i) => node("td", { class: "verdict", style: width(column, 14, 44, 60) }, column.texts[column.texts_of[i]], " ", ...badges(column.values[i], column)),
  name(column, i) {
    const text = column.texts[column.values[i]], target = `${column.link}-${column.by_text ? text : i}`;
    const linked = column.link && document.getElementById(target);
    const file = column.files ? (column.folder + column.files[i]) : text;
    return node("td", { class: "name", style: width(column, 4, 30, 36), title: file }, linked ? node("a", { href: `#${target}` }, text) : text);
  },
};

function keyOf(column) {
  if (column.kind === "number") return (i) => column.values[i];
  if (column.kind === "flags") return (i) => column.texts[column.texts_of[i]] || (column.values[i] ? `~${String(column.values[i]).padStart(12, "0")}` : null);
  return (i) => column.texts[column.values[i]] || null;
}

function sorted(rows, column, ascending) {
  const key = keyOf(column), sign = ascending ? 1 : -1;
  return [...rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === null || y === null) return (x === null) - (y === null) || a - b;   // what is missing goes last, either way
    return sign * (typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true })) || a - b;
  });
}

function build(place) {
  const data = JSON.parse(document.getElementById(`table-${place.dataset.table}`).textContent);
  const all = Array.from({ length: data.rows }, (_, i) => i);
  const state = { rows: all, first: 0, column: null, ascending: true };
  const body = node("tbody"), head = node("tr"), count = node("span", { class: "count", "aria-live": "polite" });
  const status = data.columns.find((c) => c.kind === "status"), flags = data.columns.find((c) => c.kind === "flags");
  const texts = data.columns.filter((c) => c.texts);

  const search = node("input", { type: "search", placeholder: "search", "aria-label": "Search in the table" });
  const only = node("select", { "aria-label": "Which rows" }, node("option", { value: "" }, "all"));
  for (const text of status ? status.texts : []) only.append(node("option", { value: text }, text));
  if (flags && flags.values.some(Boolean)) only.append(node("option", { value: "flagged" }, "with a flag"));
  const back = node("button", { type: "button", "aria-label": "Rows before" }, "\u2039");
  const on = node("button", { type: "button", "aria-label": "Rows after" }, "\u203a");

  function draw() {
    const rows = state.rows.slice(state.first, state.first + PAGE);
    body.replaceChildren(...rows.map((i) => {
      const attributes = data.id ? { id: `${data.id}-${i}` } : {};
      if (status && status.texts[status.values[i]] === "skipped") attributes.class = "left-out";
      return node("tr", attributes, ...data.columns.map((column) => CELLS[column.kind](column, i)));
    }));
    const last = Math.min(state.first + PAGE, state.rows.length);
    count.textContent = state.rows.length ? `${state.first + 1}${DASH}${last} of ${state.rows.length}` : "no row";
    back.disabled = state.first === 0;
    on.disabled = last === state.rows.length;
  }

  function choose() {
    const word = search.value.trim().toLowerCase(), kind = only.value;
    const wanted = texts.map((c) => c.texts.map((t) => t.toLowerCase().includes(word)));
    const bits = flags ? flags.bits.filter(([, name]) => word && name.includes(word)).reduce((sum, [bit]) => sum | bit, 0) : 0;
    state.rows = all.filter((i) => {
      if (kind === "flagged" ? !flags.values[i] : kind && status.texts[status.values[i]] !== kind) return false;
      return !word || (flags && flags.values[i] & bits) || texts.some((c, k) => wanted[k][(c.texts_of ?? c.values)[i]]);
    });
    if (state.column) state.rows = sorted(state.rows, state.column, state.ascending);
    state.first = 0;
    draw();
  }

  data.columns.forEach((column) => {
    const button = node("button", { type: "button", title: column.title }, column.head), cell = node("th", { scope: "col" }, button);
    button.addEventListener("click", () => {
      state.ascending = cell.getAttribute("aria-sort") !== "ascending";
      state.column = column;
      [...head.cells].forEach((h) => h.removeAttribute("aria-sort"));
      cell.setAttribute("aria-sort", state.ascending ? "ascending" : "descending");
      choose();
    });
    head.append(cell);
  });
  search.addEventListener("input", choose);
  only.addEventListener("change", choose);
  back.addEventListener("click", () => { state.first -= PAGE; draw(); });
  on.addEventListener("click", () => { state.first += PAGE; draw(); });

  place.prepend(
    node("div", { class: "toolbar" }, search, ...(only.options.length > (status ? 2 : 1) ? [only] : []), node("div", { class: "group" }, back, on), count),
    node("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": place.dataset.label },
      node("table", { class: "sortable" }, node("thead", {}, head), body)));
  draw();
  return (id) => {                       // bring a row to light, by its id
    const i = data.id && id.startsWith(`${data.id}-`) ? Number(id.slice(data.id.length + 1)) : -1;
    if (!(i >= 0 && i < data.rows)) return;
    if (!state.rows.includes(i)) { search.value = only.value = ""; choose(); }
    state.first = Math.floor(state.rows.indexOf(i) / PAGE) * PAGE;
    draw();
    [...body.rows].forEach((row) => row.classList.toggle("found", row.id === id));
    document.getElementById(id).scrollIntoView({ block: "center" });
  };
}

const finders = [...document.querySelectorAll(".data-table")].map(build);
const find = () => finders.forEach((f) => f(decodeURIComponent(location.hash.slice(1))));
addEventListener("hashchange", find);
document.addEventListener("click", (event) => {         // the same link again changes no hash
  const link = event.target.closest("a[href^='#']");
  if (link && link.getAttribute("href") === location.hash) find();
});
if (location.hash) find();
})();
