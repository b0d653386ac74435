"use strict";
// The suspects, what has been decided about them, and undo

const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.rows, sizes = new Map(), examples = new Map();
for (const [name, size, pictures] of data.classes) { sizes.set(name, size); examples.set(name, pictures); }

const decisions = new Map(); // from the position of a suspect to {what, label}
const undone = []; // what undo brings back: lists of pairs of a suspect and its decision before
const WHAT = ["keep", "relabel", "drop"];

const $ = id => document.getElementById(id);
const decisionOf = r => decisions.get(r.position);
const pairOf = r => JSON.stringify([r.given_label, r.predicted_label]);
const arrow = (given, predicted) => given + " \u2192 " + predicted;
const plural = (n, one) => n.toLocaleString("en") + " " + one + (n === 1 ? "" : "s");

// Text that is appended stays text: names of classes and files are never markup
function el(tag, attributes = {}, ...inside) {
  const e = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
  e.append(...inside);
  return e;
}

// Decisions are kept in the browser, so that a review can go on later
function restore() {
  let kept = [];
  try { kept = JSON.parse(localStorage.getItem(data.key)) || []; } catch (e) {}
  const known = new Set(rows.map(r => r.position));
  for (const [position, d] of kept) if (known.has(position) && WHAT.includes(d.what)) decisions.set(position, d);
}

function save() {
  try { localStorage.setItem(data.key, JSON.stringify([...decisions])); }
  catch (e) { say("This browser does not keep decisions: export them before you close the page."); }
}

function put(changes) {
  for (const [r, d] of changes) {
    if (d) decisions.set(r.position, d);
    else decisions.delete(r.position);
  }
  save();
  refresh();
}

function decide(changes) {
  undone.push(changes.map(([r]) => [r, decisionOf(r)]));
  put(changes);
}

function undo() {
  const before = undone.pop();
  if (!before) return say("There is nothing to undo.");
  put(before);
  say(plural(before.length, "decision") + " undone.");
  if (before.length === 1) goTo(before[0][0]);
}

function say(text) { $("said").textContent = text; }
