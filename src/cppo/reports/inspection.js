"use strict";
const page = JSON.parse(document.getElementById("content").textContent);
const state = { score: page.scores.indexOf(page.chosen), threshold: 0, shown: "all" };
const cards = document.getElementById("cards");
const tip = document.getElementById("tip");

function element(kind, css, text) {
  const made = document.createElement(kind);
  if (css) made.className = css;
  if (text !== undefined) made.textContent = text;
  return made;
}

// The largest value of each score over the page: colours mean the same in every card.
const largest = page.scores.map((_, score) =>
  Math.max(1e-9, ...page.items.map((item) =>
    Math.max(0, ...item.responses.map((one) => Math.max(0, ...one.tokens.map((token) => token[3][score])))))));

function paint(span) {
  const token = span.token;
  const value = token[3][state.score] / largest[state.score];
  const strength = value >= state.threshold ? Math.max(0, Math.min(1, value)) : 0;
  span.style.setProperty("--a", strength > 0 ? (0.1 + 0.75 * Math.sqrt(strength)).toFixed(3) : "0");
  span.classList.toggle("selected", Boolean((token[2] >> state.score) & 1));
}

function fill(card) {
  if (card.filled) return;
  card.filled = true;
  const item = card.item;
  const pictures = element("div", "pictures");
  ["image", "I+ (kept)", "I\u2212 (removed)"].forEach((label, place) => {
    for (const uri of item.images[place]) {
      const figure = element("figure", "picture");
      const image = element("img");
      image.src = uri;
      image.alt = label;
      figure.append(image, element("figcaption", "soft", label));
      pictures.append(figure);
    }
  });
  if (!item.images[0].length) pictures.append(element("span", "soft", "text only"));
  const texts = element("div");
  texts.append(element("div", "question", item.question));
  const facts = element("div", "facts");
  facts.append(element("span", "", "expected " + item.answer), element("span", "", item.id));
  texts.append(facts);
  item.responses.forEach((response) => {
    const line = element("div", "response");
    for (const token of response.tokens) {
      const span = element("span", "token" + (token[1] ? " true" : ""), page.texts[token[0]]);
      span.token = token;
      span.tabIndex = 0;
      paint(span);
      line.append(span);
    }
    const verdict = element("div", "facts");
    verdict.append(element("span", response.correct ? "right" : "wrong", response.correct ? "\u2713 right" : "\u2717 wrong"));
    if (response.advantage !== null) {
      verdict.append(element("span", "", "advantage " + response.advantage.toFixed(2) +
        (response.gated ? ", gated in" : ", gated out")));
    }
    texts.append(line, verdict);
  });
  card.append(pictures, texts);
}

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) fill(entry.target);
}, { rootMargin: "600px" });

for (const item of page.items) {
  const card = element("article", "card inspected");
  card.item = item;
  cards.append(card);
  watcher.observe(card);
}

function matches(item) {
  const [first] = item.responses;
  if (state.shown === "correct") return first.correct;
  if (state.shown === "wrong") return !first.correct;
  if (state.shown === "gated") return item.responses.some((one) => one.gated);
  return true;
}

function update() {
  let shown = 0;
  for (const card of cards.children) {
    card.hidden = !matches(card.item);
    shown += card.hidden ? 0 : 1;
  }
  for (const span of cards.querySelectorAll(".token")) paint(span);
  document.getElementById("shown").textContent = shown + " of " + page.items.length + " items";
  document.getElementById("least").textContent = (state.threshold * largest[state.score]).toPrecision(2);
  document.getElementById("most").textContent = largest[state.score].toPrecision(2);
}

const choice = document.getElementById("score");
page.scores.forEach((name, place) => {
  const option = element("option", "", name);
  option.value = place;
  choice.append(option);
});
choice.value = state.score;
choice.addEventListener("change", () => { state.score = Number(choice.value); update(); });
document.getElementById("threshold").addEventListener("input", (event) => {
  state.threshold = Number(event.target.value);
  update();
});
for (const button of document.querySelectorAll("[data-shown]")) {
  button.addEventListener("click", () => {
    state.shown = button.dataset.shown;
    for (const other of document.querySelectorAll("[data-shown]")) other.setAttribute("aria-pressed", other === button);
    update();
  });
}

function row(cells, head) {
  const line = element("tr");
  cells.forEach((cell, place) => line.append(element(head || place === 0 ? "th" : "td", "", cell)));
  return line;
}

function explain(span) {
  const [text, truth, , scores, logps, entropies, kept, removed, alternatives] = span.token;
  tip.replaceChildren(element("b", "", JSON.stringify(page.texts[text])));
  if (truth !== null) tip.append(element("div", "soft", truth ? "read from the image (truth)" : "not read from the image (truth)"));
  const figures = element("table");
  figures.append(row(["nats", "image", "I+", "I\u2212"], true));
  figures.append(row(["log-prob", ...logps.map((value) => value.toPrecision(3))]));
  figures.append(row(["entropy", ...entropies.map((value) => value.toPrecision(3))]));
  page.divergences.forEach((name, place) =>
    figures.append(row([name, "", kept[place].toPrecision(3), removed[place].toPrecision(3)])));
  const marks = element("table");
  marks.append(row(["dependency score", ""], true));
  page.scores.forEach((name, place) => marks.append(row([name, scores[place].toPrecision(3)])));
  const others = element("table");
  others.append(row(["likeliest", "image", "I+", "I\u2212"], true));
  for (let place = 0; place < alternatives[0].length; place++) {
    others.append(row([String(place + 1), ...alternatives.map((view) =>
      JSON.stringify(page.texts[view[place][0]]) + " " + (view[place][1] / 10).toFixed(1) + " %")]));
  }
  tip.append(figures, marks, others);
  tip.hidden = false;
  const box = span.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, window.innerWidth - tip.offsetWidth - 8));
  const below = box.bottom + 6 + tip.offsetHeight < window.innerHeight;
  tip.style.left = left + "px";
  tip.style.top = (below ? box.bottom + 6 : Math.max(8, box.top - tip.offsetHeight - 6)) + "px";
}

for (const kind of ["mouseover", "focusin", "click"]) {
  document.addEventListener(kind, (event) => {
    const span = event.target.closest ? event.target.closest(".token") : null;
    if (span) explain(span); else tip.hidden = true;
  });
}
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
update();
