// The parts of the page that are drawn anew with each answer: lists with bars, and the reasons for an item.

export function element(tag, content = "", className = "") {
  const node = document.createElement(tag);
  node.append(content);
  if (className) node.className = className;
  return node;
}

export function listItem(...parts) {
  const node = document.createElement("li");
  node.append(...parts);
  return node;
}

const percent = (share) => `${(100 * share).toPrecision(3)}%`;
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 2 });

function bar(share, className = "") {
  const node = element("div", "", "bar");
  const filled = element("span", "", className);
  filled.style.width = `${(100 * Math.min(Math.max(share, 0), 1)).toFixed(1)}%`;
  node.append(filled);
  node.setAttribute("aria-hidden", "true");
  return node;
}

// A list of items. Probabilities are drawn as bars, of which the first is the longest. `action` makes the button of an item.
export function chart(items, action = null) {
  const list = element("ol", "", "items");
  const largest = Math.max(...items.map((item) => item.probability ?? 0));
  for (const item of items) {
    const known = item.probability !== undefined;
    const score = item.score === null ? "∞" : item.score.toPrecision(4);
    const title = element("div", "", "title");
    title.append(
      element("bdi", item.title),
      element("span", known ? percent(item.probability) : score, known ? "score chance" : "score"),
    );
    const node = listItem(title);
    node.dataset.item = item.item_id;
    if (known) node.append(bar(item.probability / largest));
    if (action) node.append(action(item));
    list.append(node);
  }
  return list;
}

// The probability as a product, in words: a share by popularity, times a factor for each other reason.
export function reasonsFor({ title, probability, explanation }) {
  if (!explanation) return [element("p", "A part of the index did not answer. Try again.")];
  const { popularity, normalisation, ...others } = explanation.terms;
  const words = {
    state: "what the language model reads in the history",
    title: "what the language model reads in the title",
    transitions: "what came after the last items",
    repetition: "already in the history",
  };
  const factors = Object.entries(others).filter(([name, nats]) => name !== "repetition" || nats);
  const longest = Math.max(...factors.map(([, nats]) => Math.abs(nats)), 1e-9);
  const terms = document.createElement("dl");
  terms.append(element("dt", "popularity"), element("dd", percent(Math.exp(popularity + normalisation))));
  for (const [name, nats] of factors.sort((one, other) => other[1] - one[1])) {
    const word = element("dt", words[name] ?? name);
    word.append(bar(Math.abs(nats) / longest, nats < 0 ? "less" : ""));
    terms.append(word, element("dd", `${nats < 0 ? "÷" : "×"} ${short.format(Math.exp(Math.abs(nats)))}`));
  }
  terms.append(element("dt", "probability to come next", "total"), element("dd", percent(probability), "total"));
  return [element("h4", `Why ${title}?`), terms, ...itemsBefore(explanation), ...sequences(explanation, title)];
}

function itemsBefore({ after }) {
  if (!after.length) return [];
  const list = document.createElement("ul");
  list.append(...after.slice(0, 3).map((one) => {
    const node = listItem("after ", element("bdi", one.title), `, ${Math.round(100 * one.share)}%`);
    node.append(bar(one.share));
    return node;
  }));
  return [element("h4", "It often came after items of this history"), list];
}

function sequences({ sequences: found }, title) {
  if (!found.length) return [];
  const list = document.createElement("ul");
  list.append(...found.map((titles) => {
    const node = document.createElement("li");
    for (const one of titles) node.append(element("bdi", one), element("span", " → ", "then"));
    node.append(element("strong", title));
    return node;
  }));
  return [element("h4", "The most similar sequences of the training data"), list];
}
