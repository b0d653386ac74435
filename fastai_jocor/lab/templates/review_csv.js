// reviewed.csv out and in, with the same escapes as `write_table` and `read_table`

const NEEDED = ["item", "given_label", "predicted_label", "decision"];
const COLUMNS = [...(rows.some(r => r.part) ? ["part"] : []), "position", ...NEEDED];
const FORMULA = /^[=+\-@\t\r\n']/;

function cell(t) {
  t = String(t);
  if (FORMULA.test(t)) t = "'" + t;
  return /[",\r\n]/.test(t) ? '"' + t.replace(/"/g, '""') + '"' : t;
}

function plain(t) { return t[0] === "'" && FORMULA.test(t.slice(1)) ? t.slice(1) : t; }

function csv() {
  const lines = [COLUMNS];
  for (const r of rows) {
    const d = decisionOf(r);
    const line = d && {...r, predicted_label: d.label ?? r.predicted_label, decision: d.what};
    if (d) lines.push(COLUMNS.map(o => line[o]));
  }
  return lines.map(o => o.map(cell).join(",") + "\r\n").join("");
}

function exportCsv() {
  const a = el("a", {download: "reviewed.csv"});
  a.href = URL.createObjectURL(new Blob([csv()], {type: "text/csv"}));
  a.click();
  say(plural(decisions.size, "decision") + " exported.");
}

// The cells of a CSV, line by line
function parse(text) {
  const lines = [[]];
  const part = /(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r?\n|\r|$)/y;
  text = text.replace(/^\ufeff/, "");
  while (part.lastIndex < text.length) {
    const m = part.exec(text);
    if (!m) throw new Error("line " + lines.length + " has a quotation mark in the wrong place");
    lines[lines.length - 1].push(plain(m[1] === undefined ? m[2] : m[1].replace(/""/g, '"')));
    if (m[3] !== ",") lines.push([]);
    else if (part.lastIndex === text.length) lines[lines.length - 1].push("");
  }
  return lines.filter(o => o.length > 1);
}

// Suspects, or lines of a file, by item and given label
function alike(all) {
  const groups = new Map();
  for (const o of all) {
    const name = JSON.stringify([o.item, o.given_label]);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(o);
  }
  return groups;
}

const samePart = (a, b) => !a.part || !b.part || a.part === b.part;

// Decisions fit a suspect if its item, its given label and its part are the same; if several are, by their positions
function matches(lines) {
  const suspects = alike(rows), found = [];
  for (const [name, same] of alike(lines)) for (const o of same) {
    const fit = (suspects.get(name) || []).filter(r => samePart(r, o));
    const several = fit.length > 1 || same.filter(other => samePart(other, o)).length > 1;
    const r = several ? fit.find(r => String(r.position) === o.position) : fit[0];
    if (r) found.push([r, o]);
  }
  return found;
}

function load(text) {
  const [head = [], ...cells] = parse(text), changes = new Map();
  const missing = NEEDED.find(o => !head.includes(o));
  if (missing) throw new Error("it has no column " + missing);
  const lines = cells.map(line => Object.fromEntries(head.map((o, i) => [o, line[i]])));
  for (const [r, o] of matches(lines)) {
    const what = o.decision;
    if (WHAT.includes(what)) changes.set(r, what === "relabel" ? {what, label: o.predicted_label} : {what});
  }
  if (changes.size) decide([...changes]);
  const rest = lines.length - changes.size;
  say(plural(changes.size, "decision") + " loaded." + (rest ? " " + rest.toLocaleString("en") +
    " fit no suspect here: another item or part, another given label, a name that several items have, " +
    "or no keep, relabel or drop." : ""));
}

async function loadFile(file) {
  try { load(await file.text()); } catch (e) { say(file.name + " cannot be loaded: " + e.message + "."); }
}
