// What is shown: filtered, sorted, and a page at a time

const PAGE = 60;
const UNDECIDED = "undecided", NOTED = "with a note", PLAIN = "without a note";
let shown = [], first = 0, current = null;
const cards = new Map(); // from the suspects of the page to their cards

const kindOf = note => note.split(/ to |[,:;]/)[0];

const filters = {
  decision: (r, v) => (decisionOf(r) || {what: UNDECIDED}).what === v,
  pair: (r, v) => pairOf(r) === v,
  given: (r, v) => JSON.stringify(r.given_label) === v,
  noted: (r, v) => v === NOTED ? r.note : v === PLAIN ? !r.note : JSON.stringify(kindOf(r.note)) === v,
  part: (r, v) => r.part === v,
  find: (r, v) => [r.item, r.note, r.evidence, r.text].some(o => o.toLowerCase().includes(v.toLowerCase())),
};

function show() {
  const active = Object.entries(filters).map(([id, fits]) => [fits, $(id).value]).filter(([, v]) => v !== "");
  shown = rows.filter(r => active.every(([fits, v]) => fits(r, v)));
  const by = $("sort").value;
  if (by) shown.sort((a, b) => a[by] < b[by] ? -1 : a[by] > b[by] ? 1 : 0);
  showPage(0);
  markOverview();
}

function showPage(page) {
  first = page * PAGE;
  const part = shown.slice(first, first + PAGE), pages = Math.ceil(shown.length / PAGE);
  cards.clear();
  for (const r of part) cards.set(r, card(r));
  $("list").replaceChildren(...cards.values());
  $("list").start = first + 1;
  $("empty").hidden = part.length > 0;
  $("empty").textContent = rows.length ? "No suspect is like this." : "There is no suspect to decide about.";
  $("pages").hidden = pages < 2;
  $("page").textContent = "page " + (page + 1) + " of " + pages;
  current = null;
  setCurrent(part[0] || null);
  refresh();
}

function turn(step) {
  const page = first / PAGE + step;
  if (page < 0 || page * PAGE >= shown.length) return;
  showPage(page);
  goTo(current);
}

// One card is the current one: keys act on it, and the Tab key stops at its buttons only

function setCurrent(r) {
  for (const [row, on] of [[current, false], [r, true]]) {
    const c = cards.get(row);
    if (!c) continue;
    c.classList.toggle("current", on);
    c.tabIndex = on ? 0 : -1;
    for (const b of c.querySelectorAll("button")) b.tabIndex = on ? 0 : -1;
  }
  current = r;
}

function goTo(r) {
  const i = shown.indexOf(r);
  if (i < 0) return;
  if (!cards.has(r)) showPage(Math.floor(i / PAGE));
  setCurrent(r);
  if ($("large").open) return fillLarge();
  cards.get(r).focus({preventScroll: true});
  cards.get(r).scrollIntoView({block: "nearest"});
}

function move(step) {
  const r = shown[shown.indexOf(current) + step];
  if (r) goTo(r);
  else if (current) say("There is no further suspect here.");
}

function perLine() {
  const tops = [...cards.values()].map(c => c.offsetTop);
  return tops.filter(o => o === tops[0]).length;
}

// Cards

function picture(src, alt) { return src ? el("img", {src, alt}) : el("span", {}, "no picture"); }

function examplesOf(label, title) {
  const found = (examples.get(label) || []).map((o, i) => picture(o, "example " + (i + 1) + " of " + label));
  return found.length ? [el("figure", {}, el("figcaption", {title: title + ": " + label}, label), ...found)] : [];
}

function face(r) {
  const label = "Enlarge " + (r.text || r.item), predicted = r.predicted_label !== r.given_label;
  const seen = r.text ? el("span", {class: "text"}, r.text) : picture(r.picture, r.item);
  const button = el("button", {class: "picture", "data-act": "enlarge", "aria-label": label}, seen);
  const beside = predicted ? examplesOf(r.predicted_label, "predicted label") : [];
  return el("div", {class: "face"}, button, ...examplesOf(r.given_label, "given label"), ...beside);
}

function about(r) {
  const lines = [r.item, r.evidence, r.part && "part: " + r.part, r.true_label && "true label: " + r.true_label];
  const wrong = r.wrong ? r.wrong + " likely wrong" : "score " + r.score;
  const note = r.note ? [el("p", {class: "note"}, r.note)] : [];
  const pair = el("p", {class: "pair"}, el("b", {}, arrow(r.given_label, r.predicted_label)), " ",
    el("span", {class: "wrong"}, wrong));
  return el("div", {class: "about"}, pair, ...note, ...lines.filter(o => o).map(o => el("small", {}, o)));
}

function choices(r) {
  const same = r.predicted_label === r.given_label;
  const hints = {keep: ["Keep", "K"], relabel: ["Relabel", "R"], drop: ["Drop", "D"], other: ["Other\u2026", "L"]};
  const group = el("div", {class: "choices", role: "group", "aria-label": "Decision"});
  for (const [act, [text, key]] of Object.entries(hints)) {
    const button = el("button", {"data-act": act, "aria-keyshortcuts": key, title: text + " (" + key + ")"}, text);
    button.disabled = act === "relabel" && same;
    group.append(button);
  }
  return group;
}

function card(r) {
  const c = el("li", {class: "card"}, face(r), about(r), choices(r), el("p", {class: "state"}));
  for (const b of c.querySelectorAll("button")) b.tabIndex = -1;
  c.tabIndex = -1;
  c.suspect = r;
  return c;
}

// Show in a card, or in the enlarged view, what has been decided
function mark(box, r) {
  const d = decisionOf(r) || {}, as = d.what === "relabel" && d.label !== r.predicted_label ? "other" : d.what;
  for (const o of WHAT) box.classList.toggle(o, d.what === o);
  for (const b of box.querySelectorAll(".choices button")) {
    b.setAttribute("aria-pressed", String(b.dataset.act === as));
  }
  const state = !d.what ? "undecided" : d.what === "relabel" ? "relabel: " + d.label : d.what;
  box.querySelector(".state").textContent = state;
  const name = [r.item, arrow(r.given_label, r.predicted_label), r.wrong ? r.wrong + " likely wrong" : "", r.note, state];
  box.setAttribute("aria-label", name.filter(o => o).join(", "));
}

function refresh() {
  for (const [r, c] of cards) mark(c, r);
  if ($("large").open && current) mark($("large").firstElementChild, current);
  const n = {};
  for (const d of decisions.values()) n[d.what] = (n[d.what] || 0) + 1;
  const each = WHAT.filter(o => n[o]).map(o => n[o].toLocaleString("en") + " " + o).join(", ");
  const all = rows.length.toLocaleString("en");
  $("done").max = rows.length || 1;
  $("done").value = decisions.size;
  $("count").textContent = decisions.size.toLocaleString("en") + " of " + all + " decided" +
    (each ? " (" + each + ")" : "") + ", " + shown.length.toLocaleString("en") + " shown";
}
