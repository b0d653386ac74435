// The enlarged view, the choice of a label, and questions before many decisions

function fillLarge() {
  const r = current, old = $("large").firstElementChild, box = el("div");
  const focused = document.activeElement.dataset.act;
  const steps = [["previous", "Previous (P)"], ["next", "Next (N)"], ["close", "Close (Esc)"]];
  const nav = steps.map(([act, text]) => el("button", {"data-act": act}, text));
  const where = (shown.indexOf(r) + 1).toLocaleString("en") + " of " + shown.length.toLocaleString("en") + " shown";
  box.append(face(r), about(r), choices(r), el("p", {class: "state", role: "status"}),
    el("p", {class: "steps"}, ...nav, " " + where));
  old.replaceWith(box);
  mark(box, r);
  (box.querySelector(`[data-act="${focused}"]`) || box.querySelector('[data-act="next"]')).focus();
}

function enlarge() {
  if (!current || $("large").open) return;
  $("large").showModal();
  fillLarge();
  $("large").onclose = () => goTo(current);
}

// Any class as the new label: type a part of its name, or click it
function chooseLabel(advance) {
  if (!current) return;
  $("wanted").value = "";
  $("wanted").oninput = listLabels;
  $("choose").onclose = () => { if (!$("large").open) goTo(current); };
  $("choose").advance = advance;
  $("choose").showModal();
  listLabels();
  $("wanted").focus();
}

function wantedLabels() {
  const part = $("wanted").value.toLowerCase(), name = o => o.toLowerCase();
  const found = [...sizes.keys()].filter(o => o !== current.given_label && name(o).includes(part));
  return found.sort((a, b) => name(b).startsWith(part) - name(a).startsWith(part));
}

function listLabels() {
  const found = wantedLabels(), lines = found.slice(0, PAGE).map(o => {
    const pictures = (examples.get(o) || []).map(src => el("img", {src, alt: ""}));
    return el("li", {}, el("button", {"data-act": "take", "data-value": o}, o, ...pictures));
  });
  if (found.length > PAGE) lines.push(el("li", {}, "and " + (found.length - PAGE) + " more: type a part of the name"));
  $("labels").replaceChildren(...(lines.length ? lines : [el("li", {}, "no class has such a name")]));
}

function take(label) {
  if (label === undefined) return;
  decide([[current, {what: "relabel", label}]]);
  const {advance} = $("choose");
  $("choose").close();
  if (advance) move(1);
}

// Many decisions at once are asked for, and undone as one
function decideAll(what) {
  const open = shown.filter(r => !decisionOf(r)), n = shown.length - open.length;
  const verb = {keep: "Keep", relabel: "Relabel", drop: "Drop"}[what], as = what === "relabel" ? " as predicted" : "";
  const undecided = n ? open.length.toLocaleString("en") + " undecided of the " : "";
  $("question").textContent = `${verb} the ${undecided}${plural(shown.length, "suspect")} shown${as}?`;
  $("too").hidden = !n;
  $("decided").checked = !open.length;
  $("decided").nextElementSibling.textContent = "the " + n.toLocaleString("en") + " decided ones, too";
  $("ask").returnValue = "";
  $("ask").onclose = () => { if ($("ask").returnValue === "yes") putAll(what, $("decided").checked ? shown : open); };
  $("ask").showModal();
  $("yes").focus();
}

function putAll(what, some) {
  const can = what === "relabel" ? some.filter(r => r.predicted_label !== r.given_label) : some;
  const decision = r => what === "relabel" ? {what, label: r.predicted_label} : {what};
  if (can.length) decide(can.map(r => [r, decision(r)]));
  say(plural(can.length, "decision") + " made; Undo takes them back.");
}
