// The page: a history on the left, the recommendations of each aggregation on the right, and others to compare with.
const HINT = "Press Enter to add the first title found, or the text itself if there is none.";
const NOTHING = "No items left to recommend.";
const byId = (id) => document.getElementById(id);
const history = []; // {item_id, title}, or {title} for an item that the catalogue does not know
let found = []; // items found by the last search, in the same form
let aggregations = null; // descriptions by name, once the server has told them
let beams = null; // number of beams, if the server offers constrained beam search
let shownL2d = null; // {request, seconds} of the L2D-G list that is shown
let version = null; // version of the release that the footer describes

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

// The tasks are searchTitles, recommend, searchBeams and showRelease. A new run of a task aborts its previous run.
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

function showProblems() {
  if (!problems.size && byId("problem").contains(document.activeElement)) byId("search").focus();
  byId("message").textContent = [...new Set(problems.values())].join(" · ");
  byId("problem").hidden = !problems.size;
}

function element(tag, text, className) {
  const node = document.createElement(tag);
  node.textContent = text;
  if (className) node.className = className;
  return node;
}

function listItem(...parts) {
  const node = document.createElement("li");
  node.append(...parts);
  return node;
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

function listItems(answer) {
  return answer.items.map((item) => listItem(
    element("bdi", item.title),
    element("span", item.score === null ? "∞" : item.score.toPrecision(4), "score"),
  ));
}

function card(title, answer, seconds) {
  const node = document.createElement("article");
  const { encode, search, total } = answer.timing_ms;
  const parts = encode ? `model ${encode.toFixed(0)} ms, search ${search.toFixed(0)} ms, ` : "";
  const durations = `${parts}total ${total.toFixed(0)} ms`
    + ` (in this browser ${(1000 * seconds).toFixed(0)} ms)`;
  const partial = answer.partial ? `; partial: shards ${answer.missing_shards.join(", ")} are missing` : "";
  const list = document.createElement("ol");
  list.append(...listItems(answer));
  node.append(element("h3", title), element("p", durations + partial, "hint"), list);
  if (!answer.items.length) node.append(element("p", NOTHING, "hint"));
  return node;
}

async function recommend(signal) {
  running.get(searchBeams)?.abort();
  shownL2d = null;
  byId("nothing").hidden = history.length > 0;
  if (!history.length || !aggregations) { show(); return; }
  const request = {
    history: history.map((item) => item.item_id ?? { title: item.title }),
    k: Number(byId("k").value),
  };
  const lists = Object.entries(aggregations).map(([aggregation, title]) => ({ title, choice: { aggregation } }));
  const recommender = byId("recommender").value;
  if (recommender) lists.push({ title: recommender, choice: { recommender } });
  byId("lists").setAttribute("aria-busy", "true");
  const settled = await Promise.allSettled(lists.map(async ({ title, choice }) => {
    const started = performance.now();
    const answer = await fetchJson(signal, "v1/recommend", { ...request, ...choice });
    return { title, answer, seconds: (performance.now() - started) / 1000 };
  }));
  if (signal.aborted) return;
  const answers = settled.filter(({ status }) => status === "fulfilled").map(({ value }) => value);
  const l2d = settled[0].value;
  show(l2d && { request, seconds: l2d.seconds }, answers);
  if (answers.some(({ answer }) => answer.version !== version)) run(showRelease); // another release is served now
  const failed = settled.find(({ status }) => status === "rejected");
  if (failed) throw failed.reason;
}

function show(shown = null, answers = []) {
  byId("shown").textContent = answers.length ? `${answers[0].answer.items.length} recommendations in each list.` : "";
  byId("lists").replaceChildren(...answers.map(({ title, answer, seconds }) => card(title, answer, seconds)));
  byId("lists").removeAttribute("aria-busy");
  shownL2d = shown;
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
    byId("beam-items").replaceChildren(...listItems(answer));
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
  if (!aggregations) {
    ({ aggregations } = status);
    showRecommenders(Object.keys(status.recommenders).filter((name) => name !== "l2d"));
    run(recommend);
  }
  if (beams === (status.beams ?? null)) return;
  beams = status.beams ?? null;
  byId("beams-title").textContent = `Constrained beam search, ${beams} beams`;
  showWidth();
  run(searchBeams);
}

// The first recommender next to L2D is compared with it, unless the user chooses another one or none.
function showRecommenders(names) {
  byId("recommender").replaceChildren(...names.map((name) => new Option(name)), new Option("nothing", ""));
  byId("choice").hidden = !names.length;
  showWidth();
}

function showWidth() {
  document.body.classList.toggle("wide", beams !== null || !byId("choice").hidden);
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
byId("recommender").addEventListener("change", () => run(recommend));
byId("key-form").addEventListener("submit", (event) => event.preventDefault());
byId("key").addEventListener("change", () => {
  for (const task of new Set([showRelease, ...problems.keys()])) run(task);
});
byId("again").addEventListener("click", () => {
  for (const task of [...problems.keys()]) run(task);
});
showHistory();
showFound([], HINT);
run(showRelease);
