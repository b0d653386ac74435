// Everything that buttons and keys do

function decideCurrent(what, advance) {
  if (!current) return;
  const label = current.predicted_label, d = decisionOf(current) || {};
  if (what === "relabel" && label === current.given_label) return chooseLabel(advance);
  const again = d.what === what && (what !== "relabel" || d.label === label);
  if (again && !advance) decide([[current, undefined]]);
  else if (!again) decide([[current, what === "relabel" ? {what, label} : {what}]]);
  if (advance) move(1);
}

function clear() { if (current && decisionOf(current)) decide([[current, undefined]]); }

function close() { document.querySelector("dialog[open]:not(:has(~ dialog[open]))").close(); }

// `advance` tells whether the next suspect is wanted after a decision
const acts = {
  keep: advance => decideCurrent("keep", advance),
  relabel: advance => decideCurrent("relabel", advance),
  drop: advance => decideCurrent("drop", advance),
  other: chooseLabel, clear, undo, enlarge, close, showAll,
  next: () => move(1),
  previous: () => move(-1),
  lineOn: () => move(perLine()),
  lineBack: () => move(-perLine()),
  pageOn: () => turn(1),
  pageBack: () => turn(-1),
  keepAll: () => decideAll("keep"),
  relabelAll: () => decideAll("relabel"),
  dropAll: () => decideAll("drop"),
  onlyPair: (advance, value) => only("pair", value),
  onlyGiven: (advance, value) => only("given", value),
  take: (advance, value) => take(value),
  find: () => $("find").focus(),
  load: () => $("file").click(),
  export: exportCsv,
  help: () => $("help").showModal(),
};

const KEYS = [["K", "keep", "keep"], ["R", "relabel", "relabel as predicted"], ["D", "drop", "drop"],
  ["L", "other", "another label"], ["N", "next", "next"], ["P", "previous", "previous"], ["U", "undo", "undo"],
  ["E", "enlarge", "enlarge"], ["C", "clear", "undecided again"], ["Shift+K", "keepAll", "keep all shown"],
  ["Shift+R", "relabelAll", "relabel all shown"], ["Shift+D", "dropAll", "drop all shown"],
  ["]", "pageOn", "next page"], ["[", "pageBack", "previous page"], ["/", "find", "find"], ["A", "showAll", "show all"],
  ["X", "export", "export reviewed.csv"], ["?", "help", "all keys"]];
const OF_CARDS = {ArrowRight: "next", ArrowLeft: "previous", ArrowDown: "lineOn", ArrowUp: "lineBack"};
const SHORT = 8; // so many keys are shown above the suspects

function fillKeys() {
  const line = ([key, , text]) => [el("kbd", {}, key), " " + text + " "];
  $("keys").append(...KEYS.slice(0, SHORT).flatMap(line), ...line(KEYS[KEYS.length - 1]));
  const arrows = [["\u2190 \u2192 \u2191 \u2193", , "go from card to card"], ["Enter", , "enlarge the card"],
    ["Esc", , "close what is open"]];
  for (const [key, , text] of [...KEYS, ...arrows]) {
    $("all-keys").append(el("tr", {}, el("td", {}, el("kbd", {}, key)), el("td", {}, text)));
  }
}

function actOf(e) {
  const large = $("large").open, here = e.target;
  if ((e.ctrlKey || e.metaKey) && e.key.toLowerCase() === "z") return "undo";
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  if (e.key === "Enter" && here.matches(".card")) return "enlarge";
  if (OF_CARDS[e.key] && (large || here.closest(".card"))) return OF_CARDS[e.key];
  const letter = /^[a-z]$/i.test(e.key), key = (letter && e.shiftKey ? "Shift+" : "") + e.key.toUpperCase();
  return (KEYS.find(([o]) => o.toUpperCase() === key.toUpperCase()) || [])[1];
}

document.addEventListener("keydown", e => {
  if (e.target.matches("#wanted") && e.key === "Enter") { e.preventDefault(); take(wantedLabels()[0]); }
  if (e.target.matches("input, select") || $("choose").open || $("ask").open || $("help").open) return;
  const act = actOf(e);
  if (!act) return;
  e.preventDefault();
  acts[act](true);
});

document.addEventListener("click", e => {
  const button = e.target.closest("[data-act]"), c = e.target.closest(".card");
  if (c && c.suspect !== current) setCurrent(c.suspect);
  if (e.target.matches("dialog")) e.target.close();
  if (button) acts[button.dataset.act]($("large").open, button.dataset.value);
});

document.addEventListener("focusin", e => {
  const c = e.target.closest(".card");
  if (c && c.suspect !== current) setCurrent(c.suspect);
});

$("file").onchange = async () => { await loadFile($("file").files[0]); $("file").value = ""; };
for (const o of document.querySelectorAll("#top details")) o.open = matchMedia("(min-width: 50em)").matches;
restore();
fillHead(); fillMatrix(); fillClasses(); fillMenus(); fillKeys();
show();
