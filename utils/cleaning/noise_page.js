"use strict";
const page = id => document.getElementById(id), main = document.querySelector("main");
const min = page("min"), max = page("max");
const KEY = "decisions " + main.dataset.key, ANSWERS = {r: "right", w: "wrong", s: "skip"};
const cards = [...main.children].map(card => ({
  card, score: Number(card.dataset.score), row: JSON.parse(card.dataset.row),
  place: {worst: card.dataset.worst, sample: card.dataset.sample},  // in each tab, if it is there
}));
let tab, answers = {};  // by number of the pair

// ---- what is shown ------------------------------------------------------------------------------

const inOrder = name =>  // the cards of a tab
  cards.filter(({place}) => place[name]).sort((a, b) => a.place[name] - b.place[name]);

function openTab(name) {
  tab = name;
  document.body.className = tab;
  for (const other of ["worst", "sample"]) page(other).setAttribute("aria-pressed", other == tab);
  main.replaceChildren(...inOrder(tab).map(({card}) => card));
  filter();
}

function filter() {  // an empty field is NaN, which hides nothing
  for (const {card, score} of cards)
    card.hidden = tab == "worst" && (score < min.valueAsNumber || score > max.valueAsNumber);
  count();
}

function count() {
  const here = inOrder(tab), shown = here.filter(({card}) => !card.hidden);
  page("shown").textContent = `showing ${shown.length} of ${here.length}, `
    + `${here.filter(({row}) => answers[row[0]]).length} answered`;
}

document.querySelector("form").addEventListener("input", filter);
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
for (const name of ["worst", "sample"])
  page(name).addEventListener("click", () => openTab(name));

// ---- answers ------------------------------------------------------------------------------------

function showAnswer({card, row}) {  // in the sample, an answer uncovers the model's suggestions
  card.toggleAttribute("data-answered", Boolean(answers[row[0]]));
  for (const button of card.querySelectorAll("button"))
    button.setAttribute("aria-pressed", button.value == answers[row[0]]);
}

function answer(entry, decision) {  // the same answer again takes it back
  const pair = entry.row[0];
  answers[pair] = answers[pair] == decision ? "" : decision;
  try { localStorage.setItem(KEY, JSON.stringify(answers)) } catch {}  // storage may be turned off
  showAnswer(entry);
  count();
}

function download() {
  const quoted = cell => '"' + String(cell).replaceAll('"', '""') + '"';
  const others = cards.filter(({row, place}) => !place.sample && answers[row[0]]);
  const rows = [...inOrder("sample"), ...others].map(({row}) => [...row, answers[row[0]] || ""]);
  const lines = [main.dataset.columns.split(" "), ...rows].map(row => row.map(quoted).join(","));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], {type: "text/csv"}));
  link.download = "decisions.csv";
  link.click();
}

main.addEventListener("click", event => {
  const button = event.target.closest("button");
  if (button) answer(cards.find(({card}) => card.contains(button)), button.value);
});
page("download").addEventListener("click", download);
document.addEventListener("keydown", event => {
  if (event.target.matches("input") || event.ctrlKey || event.altKey || event.metaKey) return;
  const shown = [...main.children].filter(card => !card.hidden);
  const at = shown.findIndex(card => card.contains(document.activeElement));
  const key = event.key.toLowerCase(), decision = ANSWERS[key];
  const step = decision || ["j", "arrowdown"].includes(key) ? 1
    : ["k", "arrowup"].includes(key) ? -1 : 0;
  if (!step || !shown.length) return;
  event.preventDefault();
  if (decision && at >= 0) answer(cards.find(({card}) => card == shown[at]), decision);
  const next = shown[at < 0 ? 0 : Math.max(0, Math.min(shown.length - 1, at + step))];
  next.focus();
});

for (const {card, row} of cards) answers[row[0]] = card.dataset.answer;
try { Object.assign(answers, JSON.parse(localStorage.getItem(KEY))) } catch {}
cards.forEach(showAnswer);
openTab(location.hash == "#tab=sample" ? "sample" : "worst");
