// reviewed.csv out and in, with the same escapes as `write_table` and `read_table`

const COLUMNS = ["position", "item", "given_label", "predicted_label", "decision"];
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
    if (d) lines.push([r.position, r.item, r.given_label, d.label ?? r.predicted_label, d.what]);
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

// Decisions fit a suspect if its file and its given label are the same
function load(text) {
  const [head = [], ...lines] = parse(text), at = COLUMNS.map(o => head.indexOf(o));
  const missing = COLUMNS.slice(1).find(o => !head.includes(o));
  if (missing) throw new Error("it has no column " + missing);
  const suspects = new Map(rows.map(r => [JSON.stringify([r.item, r.given_label]), r])), changes = new Map();
  for (const line of lines) {
    const [, item, given, label, what] = at.map(i => line[i]);
    const r = suspects.get(JSON.stringify([item, given]));
    if (r && WHAT.includes(what)) changes.set(r, what === "relabel" ? {what, label} : {what});
  }
  if (changes.size) decide([...changes]);
  const rest = lines.length - changes.size;
  say(plural(changes.size, "decision") + " loaded." + (rest ? " " + rest.toLocaleString("en") +
    " fit no suspect here: another file, another given label, or no keep, relabel or drop." : ""));
}

async function loadFile(file) {
  try { load(await file.text()); } catch (e) { say(file.name + " cannot be loaded: " + e.message + "."); }
}
