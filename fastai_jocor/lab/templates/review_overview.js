// The head of the page, the overview of pairs and classes, and the menus

const LINES = 8; // rows and columns of the matrix at most

function counts(keyOf) {
  const n = new Map();
  for (const r of rows) n.set(keyOf(r), (n.get(keyOf(r)) || 0) + 1);
  return n;
}
const most = n => [...n].sort((a, b) => b[1] - a[1]);
const pairs = counts(pairOf), given = counts(r => r.given_label);

function fillHead() {
  const s = data.summary;
  for (const [name, text] of s.facts) $("facts").append(el("span", {}, name + ": ", el("code", {}, text)), " ");
  $("expected").textContent = s.expected;
  $("next").textContent = s.next_command;
  for (const [id, text] of [["warning", s.warning], ["note", data.note]]) {
    $(id).textContent = text;
    $(id).hidden = !text;
  }
  if (!data.bad.length) return;
  const files = data.bad.slice(0, 500).map(o => el("li", {}, o)), rest = data.bad.length - files.length;
  if (rest) files.push(el("li", {}, "and " + rest.toLocaleString("en") + " more"));
  $("bad").append(el("h2", {}, plural(data.bad.length, "file") + " cannot be read"), el("ul", {}, ...files));
}

function fillMatrix() {
  const predicted = counts(r => r.predicted_label), highest = Math.max(1, ...pairs.values());
  const [lines, columns] = [given, predicted].map(n => most(n).slice(0, LINES).map(([name]) => name));
  const head = (scope, o) => el("th", {scope, title: o}, el("span", {}, o));
  $("matrix").append(el("tr", {}, el("td"), ...columns.map(o => head("col", o))));
  for (const g of lines) {
    const cells = columns.map(p => el("td", {}, ...pairButton(g, p, highest)));
    $("matrix").append(el("tr", {}, head("row", g), ...cells));
  }
  if (Math.max(given.size, predicted.size) > LINES) {
    $("cut").textContent = "These are the most frequent classes; the menu of pairs has all.";
  }
}

function pairButton(g, p, highest) {
  const pair = JSON.stringify([g, p]), n = pairs.get(pair);
  if (!n) return [];
  const button = el("button", {"data-act": "onlyPair", "data-value": pair, "aria-label": arrow(g, p) + ": " + n,
    title: arrow(g, p)}, String(n));
  button.style.setProperty("--share", n / highest);
  return [button];
}

function fillClasses() {
  const share = ([name, n]) => n / (sizes.get(name) || rows.length);
  const table = el("table"), sorted = [...given].sort((a, b) => share(b) - share(a));
  for (const o of sorted) {
    const [name, n] = o, percent = (100 * share(o)).toFixed(share(o) < 0.1 ? 1 : 0) + "%";
    const of = sizes.get(name) ? [sizes.get(name), "picture"] : [rows.length, "suspect"];
    const bar = el("span", {class: "bar"});
    bar.style.setProperty("--share", share(o) / share(sorted[0]));
    const button = el("button", {"data-act": "onlyGiven", "data-value": JSON.stringify(name)}, name);
    table.append(el("tr", {}, el("th", {scope: "row"}, button), el("td", {}, bar, percent + ", " + n.toLocaleString("en") + " of " + plural(...of))));
  }
  $("classes").append(table);
}

function markOverview() {
  for (const b of document.querySelectorAll("#matrix button, #classes button")) {
    const menu = $(b.dataset.act === "onlyPair" ? "pair" : "given");
    b.setAttribute("aria-pressed", String(menu.value === b.dataset.value));
  }
}

// A click on a pair or a class shows its suspects only; another click shows all again
function only(id, value) {
  const before = $(id).value;
  for (const o of ["pair", "given"]) $(o).value = "";
  $(id).value = before === value ? "" : value;
  show();
  $("bar").scrollIntoView({block: "start"});
}

function fillMenu(id, all, options) {
  for (const [value, text] of [["", all], ...options]) $(id).append(el("option", {value}, text));
  $(id).parentElement.hidden = !options.length;
  $(id).onchange = show;
}

function fillMenus() {
  const withCount = ([o, n]) => o + " (" + n.toLocaleString("en") + ")";
  fillMenu("decision", "all", [UNDECIDED, ...WHAT].map(o => [o, o]));
  fillMenu("pair", "all pairs", most(pairs).map(([pair, n]) => [pair, withCount([arrow(...JSON.parse(pair)), n])]));
  fillMenu("given", "all classes", most(given).map(([o, n]) => [JSON.stringify(o), withCount([o, n])]));
  const kinds = most(counts(r => kindOf(r.note))).filter(([o]) => o).slice(0, 12);
  const noted = kinds.map(([o, n]) => [JSON.stringify(o), withCount([o, n])]);
  fillMenu("noted", "any", noted.length ? [[NOTED, NOTED], [PLAIN, PLAIN], ...noted] : []);
  fillMenu("part", "all", most(counts(r => r.part)).filter(([o]) => o).map(o => [o[0], withCount(o)]));
  const by = {item: "file", given_label: "given label", predicted_label: "predicted label"};
  fillMenu("sort", "most suspect first", Object.entries(by));
  $("find").oninput = show;
}

function showAll() {
  for (const id of Object.keys(filters)) $(id).value = "";
  show();
}
