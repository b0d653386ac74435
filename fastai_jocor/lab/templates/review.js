"use strict";
const {rows, bad, note, key} = JSON.parse(document.getElementById("data").textContent);
const STEP = 60, COLUMNS = ["position", "item", "given_label", "predicted_label"];
const $ = id => document.getElementById(id);
const pairOf = r => r.given_label + " \u2192 " + r.predicted_label;
let decisions = {}, shown = [], n = 0;
try { decisions = JSON.parse(localStorage.getItem(key)) || {}; } catch (e) {}

function el(tag, text, cls) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (cls) e.className = cls;
  return e;
}

// decisions are kept in the browser, so that a review can go on later

function save() {
  try { localStorage.setItem(key, JSON.stringify(decisions)); } catch (e) {}
  count();
}

function choice(r, what, card) {
  const label = el("label"), input = el("input");
  input.type = "radio"; input.name = "d" + r.position; input.value = what;
  input.checked = decisions[r.position] === what;
  input.onchange = () => { decisions[r.position] = what; save(); card.className = "card " + what; };
  label.append(input, what);
  return label;
}

function card(r) {
  const c = el("article", undefined, "card " + (decisions[r.position] || ""));
  const p = el("div", r.picture ? "" : "no picture", "picture");
  if (r.picture) { const img = el("img"); img.src = r.picture; img.alt = r.item; p.append(img); }
  const f = el("fieldset");
  f.append(el("legend", pairOf(r)), ...["keep", "relabel", "drop"].map(what => choice(r, what, c)));
  const t = el("div", undefined, "text");
  t.append(f, el("small", r.item), el("small", "score " + r.score), el("small", r.evidence));
  c.append(p, t);
  return c;
}

// what is shown: filtered, sorted, and a part at a time while the reader scrolls

function more() {
  const part = shown.slice(n, n + STEP);
  n += part.length;
  $("list").append(...part.map(card));
}

function count() {
  const decided = Object.keys(decisions).length;
  $("count").textContent = shown.length + " of " + rows.length + " suspects, " + decided + " decided";
}

function show() {
  const by = $("sort").value, pair = $("pair").value;
  const byScore = (a, b) => b.score - a.score;
  const byText = (a, b) => a[by] < b[by] ? -1 : a[by] > b[by] ? 1 : byScore(a, b);
  shown = rows.filter(r => pair === "" || pairOf(r) === pair);
  shown.sort(by === "score" ? byScore : byText);
  n = 0;
  $("list").replaceChildren();
  more(); count();
}

function listPairs() {
  const all = el("option", "all pairs of classes"), pairs = new Map();
  for (const r of rows) pairs.set(pairOf(r), (pairs.get(pairOf(r)) || 0) + 1);
  all.value = ""; $("pair").append(all);
  for (const [p, k] of [...pairs].sort((a, b) => b[1] - a[1])) {
    const o = el("option", p + " (" + k + ")");
    o.value = p; $("pair").append(o);
  }
}

// reviewed.csv, with the same escapes as `write_table`

function cell(t) {
  t = String(t);
  if (/^[=+\-@\t\r\n']/.test(t)) t = "'" + t;
  return /[",\r\n]/.test(t) ? '"' + t.replace(/"/g, '""') + '"' : t;
}

function csv() {
  const line = r => [...COLUMNS.map(c => r[c]), decisions[r.position]].map(cell).join(",");
  const lines = rows.filter(r => decisions[r.position]).map(line);
  return [[...COLUMNS, "decision"].join(","), ...lines].join("\r\n") + "\r\n";
}

$("export").onclick = () => {
  const a = el("a");
  a.href = URL.createObjectURL(new Blob([csv()], {type: "text/csv"}));
  a.download = "reviewed.csv"; a.click();
};

$("all").onclick = () => {
  for (const r of shown) decisions[r.position] = decisions[r.position] || "relabel";
  save(); show();
};

listPairs();
$("sort").onchange = show; $("pair").onchange = show;
if (note) $("note").append(el("p", note));
if (bad.length) $("bad").append(el("h2", bad.length + " files that cannot be read"), ...bad.map(b => el("p", b)));
const reached = e => { if (e[0].isIntersecting && n < shown.length) more(); };
new IntersectionObserver(reached, {rootMargin: "800px"}).observe($("end"));
show();
