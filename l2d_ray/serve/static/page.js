// The page: a history on the left, and lists of recommendations side by side on the right, with reasons.
import { chart, element, listItem, reasonsFor } from "./parts.js";

const HINT = "Press Enter to add the first title found, or the text itself if there is none.";
const EMPTY = "Add an item to the history to see recommendations.";
const NOTHING = "No items left to recommend.";
const EXPLAINED = "posterior"; // the aggregation whose scores the server explains
const byId = (id) => document.getElementById(id);
const history = []; // {item_id, title}, or {title} for an item that the catalogue does not know
let found = []; // items found by the last search, in the same form
let offered = []; // {title, choice} of every list, once the server has told them
let beams = null; // number of beams, if the server offers constrained beam search
let shownL2d = null; // {request, seconds} of the L2D-G list that is shown
let version = null; // version of the release that the footer describes
let asked = null; // {item, reasons}: the item to explain, and where

async function fetchJson(signal, path, body) {
  const headers = { "Content-Type": "application/json" };
  const key = byId("key").value;
  if (key) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`;
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  const response = await fetch(path, { ...options, headers, signal }).catch((error) => {
    throw signal.aborted ? error : new Error("Cannot reach the server.");
  });
  const answer = await response.json().catch((error) => {
    if (signal.aborted) throw error;
    if (response.ok) throw new Error("The server's response was cut off.");
    return { detail: `The server responded with status ${response.status}.` };
  });
  if (response.status === 401) {
    byId("key-form").hidden = false;
    throw new Error(key ? "The server does not accept this key." : "This server requires a key. Enter it in the field “Key”.");
  }
  if (!response.ok) throw new Error(answer.detail);
  return answer;
}

// The tasks are searchTitles, recommend, explain, searchBeams and showRelease. A new run of a task aborts its previous run.
const running = new Map(); // task -> AbortController of its last run
const problems = new Map(); // task -> error message of its last run

async function run(task) {
  running.get(task)?.abort();
  const controller = new AbortController();
  running.set(task, controller);
  try {
    await task(controller.signal);
    if (!controller.signal.aborted) problems.delete(task);
  } catch (error) {
    if (!controller.signal.aborted) problems.set(task, error.message);
  }
  showProblems();
  return !controller.signal.aborted && !problems.has(task);
}

function stop(task) {
  running.get(task)?.abort();
  problems.delete(task);
  showProblems();
}

function showProblems() {
  if (!problems.size && byId("problem").contains(document.activeElement)) byId("search").focus();
  byId("message").textContent = [...new Set(problems.values())].join(" · ");
  byId("problem").hidden = !problems.size;
}

function button(content, label, action) {
  const node = document.createElement("button");
  node.type = "button";
  node.append(content);
  node.setAttribute("aria-label", label);
  node.addEventListener("click", action);
  return node;
}

function showHistory() {
  byId("history").replaceChildren(...history.map((item, position) => listItem(
    element("bdi", item.title),
    button("✕", `Remove ${item.title}`, () => remove(position)),
  )));
  byId("clear").hidden = !history.length;
}

function remove(position) {
  history.splice(position, 1);
  update();
  const buttons = byId("history").querySelectorAll("button");
  (buttons[Math.min(position, buttons.length - 1)] ?? byId("search")).focus();
}

function add(item) {
  running.get(searchTitles)?.abort();
  history.push(item);
  byId("search").value = "";
  showFound([], HINT);
  byId("search").focus();
  update();
}

function showFound(items, hint) {
  found = items;
  byId("hint").textContent = hint;
  const focused = byId("found").contains(document.activeElement);
  byId("found").replaceChildren(...items.map((item) => {
    const text = item.item_id === undefined ? `“${item.title}” as text` : item.title;
    return listItem(button(element("bdi", text), `Add ${text}`, () => add(item)));
  }));
  if (focused) (byId("found").querySelector("button") ?? byId("search")).focus();
}

async function searchTitles(signal) {
  const query = byId("search").value.trim();
  if (!query) { showFound([], HINT); return; }
  const { items } = await fetchJson(signal, `v1/items?most=8&query=${encodeURIComponent(query)}`);
  const known = items.some((item) => item.title === query);
  const count = items.length === 8 ? "The first 8 titles" : `${items.length} title${items.length === 1 ? "" : "s"} found`;
  showFound(
    known ? items : [...items, { title: query }],
    items.length ? `${count}; press Enter to add the first.` : "Not in the catalogue; press Enter to add the text itself.",
  );
}

function requestOf(choice) {
  return {
    history: history.map((item) => item.item_id ?? { title: item.title }),
    k: Number(byId("k").value),
    ...choice,
  };
}

function card({ title, choice }, answer, seconds) {
  const node = document.createElement("article");
  const { encode, search, total } = answer.timing_ms;
  const parts = encode ? `model ${encode.toFixed(0)} ms, search ${search.toFixed(0)} ms, ` : "";
  const durations = `${parts}total ${total.toFixed(0)} ms`
    + ` (in this browser ${(1000 * seconds).toFixed(0)} ms)`;
  const partial = answer.partial ? `; partial: shards ${answer.missing_shards.join(", ")} are missing` : "";
  const [name, ...rest] = title.split(", ");
  const heading = element("h3", name);
  if (rest.length) heading.append(element("small", rest.join(", ")));
  const list = chart(answer.items, choice.aggregation === EXPLAINED ? (item) => whyButton(item) : null);
  node.append(heading, element("p", durations + partial, "hint"), list);
  if (!answer.items.length) node.append(element("p", NOTHING, "hint"));
  return node;
}

// A button that opens the reasons for an item below it. Only one item's reasons are open at a time.
function whyButton(item) {
  const node = button("Why?", `Why ${item.title}?`, () => {
    const open = node.getAttribute("aria-expanded") === "true";
    closeReasons();
    if (open) return;
    const reasons = element("div", "…", "reasons");
    reasons.id = "reasons";
    reasons.setAttribute("aria-live", "polite");
    node.setAttribute("aria-expanded", "true");
    node.setAttribute("aria-controls", "reasons");
    node.after(reasons);
    asked = { item, node, reasons };
    run(explain);
  });
  node.className = "why";
  node.setAttribute("aria-expanded", "false");
  return node;
}

function closeReasons() {
  stop(explain);
  asked?.reasons.remove();
  asked?.node.setAttribute("aria-expanded", "false");
  asked?.node.removeAttribute("aria-controls");
  asked = null;
}

async function explain(signal) {
  const { item, reasons } = asked;
  const choice = { aggregation: EXPLAINED, explain: true, allow: [item.item_id], k: 1 };
  const { items } = await fetchJson(signal, "v1/recommend", requestOf(choice));
  reasons.replaceChildren(...reasonsFor(items[0] ?? item));
}

async function recommend(signal) {
  stop(searchBeams);
  closeReasons();
  shownL2d = null;
  const lists = offered.filter((list) => list.box.checked);
  byId("nothing").hidden = history.length > 0 && (lists.length > 0 || !offered.length);
  byId("nothing").textContent = history.length ? "Choose a list to see recommendations." : EMPTY;
  if (!history.length || !lists.length) { show(); return; }
  byId("lists").setAttribute("aria-busy", "true");
  const settled = await Promise.allSettled(lists.map(async (list) => {
    const request = requestOf(list.choice);
    const started = performance.now();
    const answer = await fetchJson(signal, "v1/recommend", request);
    return { list, request, answer, seconds: (performance.now() - started) / 1000 };
  }));
  if (signal.aborted) return;
  const answers = settled.filter(({ status }) => status === "fulfilled").map(({ value }) => value);
  show(answers.find(({ list }) => list.choice.aggregation === "global"), answers);
  if (answers.some(({ answer }) => answer.version !== version)) run(showRelease); // another release is served now
  const failed = settled.find(({ status }) => status === "rejected");
  if (failed) throw failed.reason;
}

function show(l2d = null, answers = []) {
  byId("shown").textContent = answers.length ? `${answers[0].answer.items.length} recommendations in each list.` : "";
  byId("lists").replaceChildren(...answers.map(({ list, answer, seconds }) => card(list, answer, seconds)));
  byId("lists").removeAttribute("aria-busy");
  shownL2d = l2d;
  run(searchBeams);
}

// Constrained beam search starts after L2D is done, so that neither slows the other down.
async function searchBeams(signal) {
  problems.delete(searchBeams);
  showProblems();
  byId("beams").hidden = !(beams && shownL2d);
  byId("beam-items").replaceChildren();
  if (byId("beams").hidden) return;
  const started = performance.now();
  const seconds = () => (performance.now() - started) / 1000;
  const tick = () => { byId("clock").textContent = `${seconds().toFixed(1)} s`; };
  const timer = setInterval(tick, 100);
  byId("progress").textContent = "generating titles …";
  tick();
  try {
    const answer = await fetchJson(signal, "v1/beam_search", shownL2d.request);
    const factor = seconds() / shownL2d.seconds;
    byId("beam-items").replaceChildren(...chart(answer.items).children);
    byId("progress").textContent = `${seconds().toFixed(1)} s, ${factor.toFixed(factor < 10 ? 1 : 0)} × the time of L2D-G`
      + `; scores are log-probabilities${answer.items.length ? "" : `. ${NOTHING}`}`;
    byId("clock").textContent = "";
  } catch (error) {
    if (!signal.aborted) byId("beams").hidden = true;
    throw new Error(`Constrained beam search: ${error.message}`);
  } finally {
    clearInterval(timer);
  }
}

function update() {
  showHistory();
  run(recommend);
}

async function showRelease(signal) {
  const status = await fetchJson(signal, "v1/status");
  const parts = [["items"], ["rows", "sequences"], ["shards"]];
  const counts = parts.filter(([name]) => name in status).map(([name, words]) => `${status[name]} ${words ?? name}`);
  const names = ["version", "snapshot", "model"].filter((name) => name in status).map((name) => `${name} ${status[name]}`);
  version = status.version;
  byId("served").textContent = [...counts, ...names].join(", ");
  if (!offered.length) {
    offerLists(status.aggregations, Object.keys(status.recommenders).filter((name) => name !== "l2d"));
    run(recommend);
  }
  if (beams === (status.beams ?? null)) return;
  beams = status.beams ?? null;
  byId("beams-title").textContent = `Constrained beam search, ${beams} beams`;
  run(searchBeams);
}

// The lists of L2D and the first other recommender are shown, unless the user chooses others.
function offerLists(aggregations, recommenders) {
  const ofL2d = Object.entries(aggregations).map(([aggregation, title]) => ({ title, choice: { aggregation } }));
  ofL2d.sort((one, other) => (other.choice.aggregation === EXPLAINED) - (one.choice.aggregation === EXPLAINED));
  const others = recommenders.map((recommender) => ({ title: recommender, choice: { recommender } }));
  offered = [...ofL2d, ...others].map((list, number) => {
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = number <= ofL2d.length;
    box.addEventListener("change", () => run(recommend));
    const label = element("label", list.title.split(", ")[0]);
    label.prepend(box);
    byId("choice").append(label);
    return { ...list, box };
  });
  byId("choice").hidden = false;
}

// The item under the pointer, or with the focus, is marked in every list.
function markSame(event) {
  const place = event.target.closest(".items > li");
  for (const item of byId("cards").querySelectorAll(".items > li")) {
    item.classList.toggle("same", place !== null && item !== place && item.dataset.item === place.dataset.item);
  }
}

let delay;
byId("search").addEventListener("input", () => {
  clearTimeout(delay);
  running.get(searchTitles)?.abort();
  delay = setTimeout(() => run(searchTitles), 120);
});
byId("search").addEventListener("keydown", async (event) => {
  if (event.key !== "Enter" || event.isComposing || !byId("search").value.trim()) return;
  clearTimeout(delay);
  if (await run(searchTitles)) add(found[0]);
});
// The arrow keys move through the titles found and back to the search field.
byId("found").parentElement.addEventListener("keydown", (event) => {
  const stops = [byId("search"), ...byId("found").querySelectorAll("button")];
  const next = stops.indexOf(event.target) + { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!stops.includes(event.target) || !stops[next]) return;
  event.preventDefault();
  stops[next].focus();
});
byId("clear").addEventListener("click", () => {
  history.length = 0;
  update();
  byId("search").focus();
});
byId("k").addEventListener("change", () => {
  byId("k").value = Math.round(Math.min(100, Math.max(1, Number(byId("k").value) || 10)));
  update();
});
byId("key-form").addEventListener("submit", (event) => event.preventDefault());
byId("key").addEventListener("change", () => {
  for (const task of new Set([showRelease, ...problems.keys()])) run(task);
});
byId("again").addEventListener("click", () => {
  for (const task of [...problems.keys()]) run(task);
});
byId("cards").addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !asked) return;
  asked.node.focus();
  closeReasons();
});
byId("cards").addEventListener("pointerover", markSame);
byId("cards").addEventListener("focusin", markSame);
byId("cards").addEventListener("pointerleave", markSame);
showHistory();
showFound([], HINT);
run(showRelease);
