"use strict";
const min = document.getElementById("min"), max = document.getElementById("max");
const text = document.getElementById("text"), shown = document.getElementById("shown");
const cards = [...document.querySelectorAll("article")].map(card => ({
  card, score: Number(card.dataset.score),
  words: [...card.querySelectorAll("q, .file")].map(e => e.textContent).join("\n").toLowerCase(),
}));

function filter() {
  const low = Number(min.value), high = Number(max.value), part = text.value.trim().toLowerCase();
  let count = 0;
  for (const {card, score, words} of cards) {
    card.hidden = score < low || score > high || !words.includes(part);
    count += !card.hidden;
  }
  for (const slider of [min, max])
    slider.nextElementSibling.value = Number(slider.value).toPrecision(4);
  shown.textContent = `showing ${count} of ${cards.length}`;
}

function readAddress() {  // e.g. suspicious_pairs.html#min=0.5&max=2&text=dog
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const input of [min, max, text])
    if (wanted.has(input.id)) input.value = wanted.get(input.id);
  filter();
}

document.querySelector("form").addEventListener("input", filter);
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
addEventListener("hashchange", readAddress);
readAddress();
