(() => {
"use strict";

/* ---------- light curve ---------- */
const svg = document.querySelector(".chart svg");
if (!svg) return;
const chart = svg.parentElement, tip = chart.querySelector(".tip"), readout = document.querySelector(".readout");
const { bits, curves, runs, time } = JSON.parse(document.getElementById("lightcurve-data").textContent);
const MARGIN = { left: 68, right: 14, top: 12, bottom: 44 };
const QUANTITIES = {
  flux: { value: "flux", error: "flux_err", label: "flux (ADU of the reference)" },
  diff: { value: "diff", error: "diff_err", label: "difference flux (ADU of the reference)" },
  mag: { value: "mag", error: "mag_err", label: "magnitude", inverted: true },
};
const state = { curve: 0, quantity: "flux", view: null, selected: null };

const finite = (v) => typeof v === "number" && Number.isFinite(v);
const quantity = () => QUANTITIES[state.quantity];
const MANY = 600;   // from so many points on they are drawn small
const made = new Map();

/* The points of a curve, made of columns when it is first looked at: one or two series, each of a run. */
function allPoints() {
  if (!made.has(state.curve)) made.set(state.curve, curves[state.curve].series.flatMap((s, k) => s.at.map((at, i) => {
    const run = runs[s.run], point = { series: k, run: run.label, name: run.names[at], epoch: run.epochs[at], mjd: run.mjd[at], x: run.x[at] };
    for (const key of ["flux", "flux_err", "diff", "diff_err", "mag", "mag_err"]) point[key] = s[key] ? s[key][i] : null;
    point.limit = s.limit[i] === 1;
    point.flags = bits.filter(([bit]) => s.flags[i] & bit).map(([, name]) => name);
    return point;
  })));
  return made.get(state.curve);
}
const points = () => allPoints().filter((p) => finite(p.x) && finite(p[quantity().value]));

function fullView() {
  const q = quantity(), all = points();
  if (!all.length) return { x0: 0, x1: 1, y0: 0, y1: 1 };
  const errors = all.map((p) => p[q.error]).filter(finite).sort((a, b) => a - b);
  const usual = errors.length ? 3 * errors[errors.length >> 1] : 0;   // one huge error bar must not flatten the rest
  const reach = (p) => Math.min(finite(p[q.error]) ? p[q.error] : 0, usual);
  const [x0, x1] = padded(all.map((p) => p.x), all.map((p) => p.x), 0.03);
  const [y0, y1] = padded(all.map((p) => p[q.value] - reach(p)), all.map((p) => p[q.value] + reach(p)), 0.06);
  return { x0, x1, y0, y1 };
}

function padded(low, high, share) {
  const a = low.reduce((m, v) => Math.min(m, v)), b = high.reduce((m, v) => Math.max(m, v));
  const pad = b > a ? (b - a) * share : Math.abs(a) * 0.05 || 0.5;
  return [a - pad, b + pad];
}

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= 0.75 * rough);
  const list = [], digits = Math.max(0, Math.min(10, -Math.floor(Math.log10(step) + 1e-9)));
  for (let i = Math.ceil(low / step); i * step <= high; i++) list.push([i * step, (i * step).toFixed(digits).replace(/^-/, "\u2212")]);
  return list;
}

function scales() {
  const width = svg.clientWidth, height = svg.clientHeight, v = state.view, down = quantity().inverted;
  const w = width - MARGIN.left - MARGIN.right, h = height - MARGIN.top - MARGIN.bottom;
  const rise = (y) => (y - v.y0) / (v.y1 - v.y0);
  return {
    width, height, w, h,
    x: (x) => MARGIN.left + ((x - v.x0) / (v.x1 - v.x0)) * w,
    y: (y) => MARGIN.top + (down ? rise(y) : 1 - rise(y)) * h,
    toX: (px) => v.x0 + ((px - MARGIN.left) / w) * (v.x1 - v.x0),
    toY: (py) => { const f = (py - MARGIN.top) / h; return v.y0 + (down ? f : 1 - f) * (v.y1 - v.y0); },
  };
}

function add(parent, name, attributes, text) {
  const element = document.createElementNS(svg.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function drawAxes(s) {
  const bottom = s.height - MARGIN.bottom, v = state.view;
  for (const [value, label] of ticks(v.x0, v.x1, Math.max(3, s.w / 110))) {
    add(svg, "line", { class: "grid", x1: s.x(value), x2: s.x(value), y1: MARGIN.top, y2: bottom });
    add(svg, "text", { x: s.x(value), y: bottom + 17, "text-anchor": "middle" }, label);
  }
  for (const [value, label] of ticks(v.y0, v.y1, Math.max(3, s.h / 60))) {
    add(svg, "line", { class: "grid", x1: MARGIN.left, x2: s.width - MARGIN.right, y1: s.y(value), y2: s.y(value) });
    add(svg, "text", { x: MARGIN.left - 7, y: s.y(value) + 4, "text-anchor": "end" }, label);
  }
  add(svg, "rect", { class: "frame", x: MARGIN.left, y: MARGIN.top, width: s.w, height: s.h });
  add(svg, "text", { x: MARGIN.left + s.w / 2, y: s.height - 8, "text-anchor": "middle" }, time);
  const middle = MARGIN.top + s.h / 2;
  add(svg, "text", { x: 13, y: middle, "text-anchor": "middle", transform: `rotate(-90 13 ${middle})` }, quantity().label);
}

/* One path for each kind of sign: ten thousand points are as quick as ten. */
function drawPoints(s) {
  const q = quantity(), plot = add(svg, "g", { "clip-path": "url(#plot-area)" });
  const shown = points().filter((p) => p.x >= state.view.x0 && p.x <= state.view.x1);
  const size = shown.length > MANY ? 4 : 8, paths = new Map();
  const draw = (kind, d) => paths.set(kind, (paths.get(kind) ?? "") + d);
  for (const p of shown) {
    const x = s.x(p.x).toFixed(1), y = s.y(p[q.value]).toFixed(1), limit = state.quantity === "mag" && p.limit;
    if (finite(p[q.error]) && !limit) draw(`bar s${p.series}`, `M${x} ${s.y(p[q.value] - p[q.error]).toFixed(1)}V${s.y(p[q.value] + p[q.error]).toFixed(1)}`);
    if (limit) draw(`limit s${p.series}`, `M${x} ${y}m-5-4h10l-5 9z`);
    else draw(`dot s${p.series}`, `M${x} ${y}h0`);
    if (!limit && p.flags.length) draw(`hole s${p.series}`, `M${x} ${y}h0`);
  }
  for (const kind of ["bar", "dot", "hole", "limit"]) for (const series of ["s0", "s1"]) {
    const d = paths.get(`${kind} ${series}`);
    const below = runs.length > 1 && series === "s0" ? 3 : 0;   // the first run shows under the second
    const width = { dot: size + below, hole: size - 3 + below }[kind];
    if (d) add(plot, "path", { class: `${kind} ${series}`, d, ...(width ? { "stroke-width": width } : {}) });
  }
  svg.dataset.points = shown.length;
}

function draw() {
  svg.replaceChildren();
  state.view ??= fullView();
  const s = scales(), q = quantity();
  if (s.w <= 0) return;
  const clip = add(add(svg, "defs", {}), "clipPath", { id: "plot-area" });
  add(clip, "rect", { x: MARGIN.left, y: MARGIN.top, width: s.w, height: s.h });
  drawAxes(s);
  drawPoints(s);
  const p = state.selected;
  if (p && finite(p.x) && finite(p[q.value])) {
    add(svg, "circle", { class: "halo", cx: s.x(p.x), cy: s.y(p[q.value]), r: 8, "clip-path": "url(#plot-area)" });
  }
}

/* ---------- what a point says ---------- */
const show = (v) => (finite(v) ? String(Number(v.toPrecision(6))).replace(/^-/, "\u2212") : "\u2013");
function linesOf(p) {
  const lines = [...(runs.length > 1 ? [p.run] : []), `MJD ${p.mjd}`, `flux ${show(p.flux)} \u00b1 ${show(p.flux_err)} ADU`, `difference ${show(p.diff)} \u00b1 ${show(p.diff_err)} ADU`];
  if (finite(p.mag)) lines.push(p.limit ? `fainter than ${show(p.mag)} mag` : `${show(p.mag)} \u00b1 ${show(p.mag_err)} mag`);
  if (p.flags.length) lines.push(`flags: ${p.flags.join(", ")}`);
  return lines;
}

function element(name, text) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  return node;
}

function showTip(p) {
  const s = scales(), x = s.x(p.x), y = s.y(p[quantity().value]);
  tip.replaceChildren(element("b", p.name), ...linesOf(p).flatMap((line) => [element("br"), line]));
  tip.hidden = false;
  const right = x + 14 + tip.offsetWidth < s.width;
  tip.style.left = `${Math.max(0, right ? x + 14 : x - 14 - tip.offsetWidth)}px`;
  tip.style.top = `${Math.max(0, Math.min(y - tip.offsetHeight / 2, s.height - tip.offsetHeight))}px`;
}

function select(p) {
  state.selected = p;
  readout.replaceChildren(element("b", p.name), ` \u00b7 ${linesOf(p).join(" \u00b7 ")}`);
  for (const [target, label] of [[`stamp-${p.epoch}`, "stamp"], [`epoch-${p.epoch}`, "row"]]) {
    if (p.epoch === null || (label === "stamp" ? !document.getElementById(target) : !document.getElementById("table-epochs"))) continue;
    const link = element("a", label);
    link.href = `#${target}`;
    readout.append(" \u00b7 ", link);
  }
  draw();
}

function nearest(px, py, reach) {
  const s = scales(), q = quantity();
  let best = null, least = reach;
  for (const p of points()) {
    const distance = Math.hypot(s.x(p.x) - px, s.y(p[q.value]) - py);
    if (distance < least) [best, least] = [p, distance];
  }
  return best;
}

/* ---------- zoom, pan, keys ---------- */
function zoom(factor, px, py) {
  const s = scales(), v = state.view;
  const cx = s.toX(px ?? MARGIN.left + s.w / 2), cy = s.toY(py ?? MARGIN.top + s.h / 2);
  state.view = {
    x0: cx - (cx - v.x0) * factor, x1: cx + (v.x1 - cx) * factor,
    y0: cy - (cy - v.y0) * factor, y1: cy + (v.y1 - cy) * factor,
  };
  draw();
}

function pan(dx, dy) {
  const s = scales(), v = state.view, sign = quantity().inverted ? -1 : 1;
  const mx = (-dx / s.w) * (v.x1 - v.x0), my = (sign * dy / s.h) * (v.y1 - v.y0);
  state.view = { x0: v.x0 + mx, x1: v.x1 + mx, y0: v.y0 + my, y1: v.y1 + my };
  draw();
}

function reset() { state.view = null; tip.hidden = true; draw(); }

const held = new Map();
const place = (event) => { const box = svg.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
const spread = () => { const [a, b] = [...held.values()]; return Math.hypot(a[0] - b[0], a[1] - b[1]); };
let moved = 0;

svg.addEventListener("pointerdown", (event) => {
  svg.setPointerCapture(event.pointerId);
  if (!held.size) moved = 0;
  held.set(event.pointerId, place(event));
});
svg.addEventListener("pointermove", (event) => {
  const [px, py] = place(event), last = held.get(event.pointerId);
  if (!last) {
    const p = nearest(px, py, 40);
    if (p) showTip(p); else tip.hidden = true;
    return;
  }
  const before = held.size === 2 ? spread() : 0;
  held.set(event.pointerId, [px, py]);
  moved += Math.hypot(px - last[0], py - last[1]);
  if (held.size === 2) { if (spread() > 0) zoom(before / spread(), px, py); }
  else if (moved > 4) { tip.hidden = true; pan(px - last[0], py - last[1]); }
});
svg.addEventListener("pointerup", (event) => {
  held.delete(event.pointerId);
  const p = moved <= 4 ? nearest(...place(event), 40) : null;
  if (p) { select(p); showTip(p); }
});
svg.addEventListener("pointercancel", (event) => held.delete(event.pointerId));
svg.addEventListener("pointerleave", () => { tip.hidden = true; });
svg.addEventListener("dblclick", reset);
svg.addEventListener("wheel", (event) => {
  if (!event.ctrlKey && document.activeElement !== svg) return;   // else the page scrolls, as one expects
  event.preventDefault();
  zoom(event.deltaY > 0 ? 1.2 : 1 / 1.2, ...place(event));
}, { passive: false });
svg.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step) {
    const all = points().sort((a, b) => a.x - b.x), at = all.indexOf(state.selected);
    const next = all[at < 0 ? 0 : Math.min(all.length - 1, Math.max(0, at + step))];
    if (next) { select(next); showTip(next); }
  } else if (event.key === "+") zoom(1 / 1.4);
  else if (event.key === "-") zoom(1.4);
  else if (event.key === "0" || event.key === "Escape") reset();
  else return;
  event.preventDefault();
});

/* ---------- toolbar ---------- */
const buttons = [...document.querySelectorAll("[data-quantity]")];
function choose(name) {
  state.quantity = name;
  buttons.forEach((b) => {
    b.setAttribute("aria-pressed", String(b.dataset.quantity === name));
    b.disabled = !allPoints().some((p) => finite(p[QUANTITIES[b.dataset.quantity].value]));
  });
  reset();
}
buttons.forEach((b) => b.addEventListener("click", () => choose(b.dataset.quantity)));
const actions = { in: () => zoom(1 / 1.4), out: () => zoom(1.4), reset };
document.querySelectorAll("[data-action]").forEach((b) => b.addEventListener("click", () => actions[b.dataset.action]()));
document.getElementById("star")?.addEventListener("change", (event) => {
  state.curve = Number(event.target.value);
  state.selected = null;
  readout.replaceChildren();
  const has = allPoints().some((p) => finite(p[quantity().value]));
  choose(has ? state.quantity : "flux");
});
new ResizeObserver(draw).observe(chart);
choose("flux");
})();
