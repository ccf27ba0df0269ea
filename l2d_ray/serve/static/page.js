// The page: a history on the left, what each aggregation recommends after it on the right.
const AGGREGATIONS = { global: "L2D-G, from all sequences", local: "L2D-L, from the nearest sequences" };
const HINT = "Enter adds the first title found, or the text itself if there is none.";
const NOTHING = "Nothing is left to recommend.";
const at = (id) => document.getElementById(id);
const history = []; // {item_id, title}, or {title} for what the catalogue does not know
let found = []; // the same, of the last search
let beams = null; // of constrained beam search, where the server offers it
let l2d = null; // {request, seconds} of the L2D-G that is shown
let version = null; // of what the foot of the page describes

async function ask(signal, path, body) {
  const headers = { "Content-Type": "application/json" };
  const key = at("key").value;
  if (key) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`;
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  const response = await fetch(path, { ...options, headers, signal }).catch((error) => {
    throw signal.aborted ? error : new Error("The server cannot be reached.");
  });
  const answer = await response.json().catch((error) => {
    if (signal.aborted) throw error;
    if (response.ok) throw new Error("The server's answer broke off.");
    return { detail: `The server answered with status ${response.status}.` };
  });
  if (response.status === 401) {
    at("key-form").hidden = false;
    throw new Error(key ? "This key is not accepted." : "A key is needed here; type it into the field “Key”.");
  }
  if (!response.ok) throw new Error(answer.detail);
  return answer;
}

// The tasks are searchTitles, recommend, write and showServed. A new run of one drops what its last run still waits for.
const running = new Map(); // task -> the AbortController of its last run
const problems = new Map(); // task -> what went wrong in its last run

async function run(task) {
  running.get(task)?.abort();
  const own = new AbortController();
  running.set(task, own);
  try {
    await task(own.signal);
    if (!own.signal.aborted) problems.delete(task);
  } catch (error) {
    if (!own.signal.aborted) problems.set(task, error.message);
  }
  tell();
  return !own.signal.aborted && !problems.has(task);
}

function tell() {
  if (!problems.size && at("problem").contains(document.activeElement)) at("search").focus();
  at("message").textContent = [...new Set(problems.values())].join(" · ");
  at("problem").hidden = !problems.size;
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function line(...parts) {
  const made = document.createElement("li");
  made.append(...parts);
  return made;
}

function button(content, label, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.append(content);
  made.setAttribute("aria-label", label);
  made.addEventListener("click", action);
  return made;
}

function showHistory() {
  at("history").replaceChildren(...history.map((item, place) => line(
    element("bdi", item.title),
    button("✕", `Remove ${item.title}`, () => remove(place)),
  )));
  at("clear").hidden = !history.length;
}

function remove(place) {
  history.splice(place, 1);
  changed();
  const buttons = at("history").querySelectorAll("button");
  (buttons[Math.min(place, buttons.length - 1)] ?? at("search")).focus();
}

function add(item) {
  running.get(searchTitles)?.abort();
  history.push(item);
  at("search").value = "";
  showFound([], HINT);
  at("search").focus();
  changed();
}

function showFound(items, hint) {
  found = items;
  at("hint").textContent = hint;
  const focused = at("found").contains(document.activeElement);
  at("found").replaceChildren(...items.map((item) => {
    const text = item.item_id === undefined ? `“${item.title}” as it is` : item.title;
    return line(button(element("bdi", text), `Add ${text}`, () => add(item)));
  }));
  if (focused) (at("found").querySelector("button") ?? at("search")).focus();
}

async function searchTitles(signal) {
  const query = at("search").value.trim();
  if (!query) { showFound([], HINT); return; }
  const { items } = await ask(signal, `v1/items?most=8&query=${encodeURIComponent(query)}`);
  const known = items.some((item) => item.title === query);
  const count = items.length === 8 ? "The first 8 titles" : `${items.length} title${items.length === 1 ? "" : "s"} found`;
  showFound(
    known ? items : [...items, { title: query }],
    items.length ? `${count}; Enter adds the first.` : "Not in the catalogue; Enter adds the text itself.",
  );
}

function lines(answer) {
  return answer.items.map((item) => line(
    element("bdi", item.title),
    element("span", item.score === null ? "∞" : item.score.toPrecision(4), "score"),
  ));
}

function card(name, answer, seconds) {
  const made = document.createElement("article");
  const { encode, search, total } = answer.timing_ms;
  const times = `model ${encode.toFixed(0)} ms, search ${search.toFixed(0)} ms, in all ${total.toFixed(0)} ms`
    + ` (here ${(1000 * seconds).toFixed(0)} ms)`;
  const partial = answer.partial ? `; partial, without shards ${answer.missing_shards.join(", ")}` : "";
  const list = document.createElement("ol");
  list.append(...lines(answer));
  made.append(element("h3", AGGREGATIONS[name]), element("p", times + partial, "hint"), list);
  if (!answer.items.length) made.append(element("p", NOTHING, "hint"));
  return made;
}

async function recommend(signal) {
  running.get(write)?.abort();
  l2d = null;
  at("nothing").hidden = history.length > 0;
  if (!history.length) { show(); return; }
  const request = {
    history: history.map((item) => item.item_id ?? { title: item.title }),
    k: Number(at("k").value),
  };
  at("lists").setAttribute("aria-busy", "true");
  try {
    const answers = await Promise.all(Object.keys(AGGREGATIONS).map(async (aggregation) => {
      const started = performance.now();
      const answer = await ask(signal, "v1/recommend", { ...request, aggregation });
      return { aggregation, answer, seconds: (performance.now() - started) / 1000 };
    }));
    show({ request, seconds: answers[0].seconds }, answers);
    if (answers.some(({ answer }) => answer.version !== version)) run(showServed); // another release is served since
  } catch (error) {
    if (!signal.aborted) show();
    throw error;
  }
}

function show(shown = null, answers = []) {
  at("shown").textContent = answers.length ? `${answers[0].answer.items.length} recommendations each.` : "";
  at("lists").replaceChildren(...answers.map(({ aggregation, answer, seconds }) => card(aggregation, answer, seconds)));
  at("lists").removeAttribute("aria-busy");
  l2d = shown;
  run(write);
}

// Constrained beam search starts when L2D is done, so that neither waits for the other or has its time.
async function write(signal) {
  problems.delete(write);
  tell();
  at("beams").hidden = !(beams && l2d);
  at("written").replaceChildren();
  if (at("beams").hidden) return;
  const started = performance.now();
  const seconds = () => (performance.now() - started) / 1000;
  const tick = () => { at("clock").textContent = `${seconds().toFixed(1)} s`; };
  const ticking = setInterval(tick, 100);
  at("progress").textContent = "writing titles …";
  tick();
  try {
    const answer = await ask(signal, "v1/beam_search", l2d.request);
    const times = seconds() / l2d.seconds;
    at("written").replaceChildren(...lines(answer));
    at("progress").textContent = `${seconds().toFixed(1)} s, ${times.toFixed(times < 10 ? 1 : 0)} × the time of L2D-G`
      + `; scores are log-probabilities${answer.items.length ? "" : `. ${NOTHING}`}`;
    at("clock").textContent = "";
  } catch (error) {
    if (!signal.aborted) at("beams").hidden = true;
    throw new Error(`Constrained beam search: ${error.message}`);
  } finally {
    clearInterval(ticking);
  }
}

function changed() {
  showHistory();
  run(recommend);
}

async function showServed(signal) {
  const status = await ask(signal, "v1/status");
  const parts = [["items"], ["rows", "sequences"], ["shards"]];
  const counts = parts.filter(([name]) => name in status).map(([name, words]) => `${status[name]} ${words ?? name}`);
  const names = ["version", "snapshot", "model"].filter((name) => name in status).map((name) => `${name} ${status[name]}`);
  version = status.version;
  at("served").textContent = [...counts, ...names].join(", ");
  if (beams === (status.beams ?? null)) return;
  beams = status.beams ?? null;
  at("beams-title").textContent = `Constrained beam search, ${beams} beams`;
  document.body.classList.toggle("with-beams", beams !== null);
  run(write);
}

let waiting;
at("search").addEventListener("input", () => {
  clearTimeout(waiting);
  running.get(searchTitles)?.abort();
  waiting = setTimeout(() => run(searchTitles), 120);
});
at("search").addEventListener("keydown", async (event) => {
  if (event.key !== "Enter" || event.isComposing || !at("search").value.trim()) return;
  clearTimeout(waiting);
  if (await run(searchTitles)) add(found[0]);
});
// Arrows go through the titles found, and back to the text.
at("found").parentElement.addEventListener("keydown", (event) => {
  const stops = [at("search"), ...at("found").querySelectorAll("button")];
  const next = stops.indexOf(event.target) + { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!stops.includes(event.target) || !stops[next]) return;
  event.preventDefault();
  stops[next].focus();
});
at("clear").addEventListener("click", () => {
  history.length = 0;
  changed();
  at("search").focus();
});
at("k").addEventListener("change", () => {
  at("k").value = Math.round(Math.min(100, Math.max(1, Number(at("k").value) || 10)));
  changed();
});
at("key-form").addEventListener("submit", (event) => event.preventDefault());
at("key").addEventListener("change", () => {
  for (const task of new Set([showServed, ...problems.keys()])) run(task);
});
at("again").addEventListener("click", () => {
  for (const task of [...problems.keys()]) run(task);
});
showHistory();
showFound([], HINT);
run(showServed);
