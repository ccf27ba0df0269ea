// The page: a history on the left, what each aggregation recommends after it on the right.
const AGGREGATIONS = { local: "L2D-L, from the nearest sequences", global: "L2D-G, from all of an item's sequences" };
const at = (id) => document.getElementById(id);
const history = []; // {item_id, title}, or {title} for what the catalogue does not know
let found = [];
let newest = 0; // number of the last round of requests: what answers an older one is dropped

async function ask(path, body) {
  const headers = { "Content-Type": "application/json" };
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  const response = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers });
  const answer = await response.json().catch(() => ({ detail: `status ${response.status}` }));
  if (!response.ok) throw new Error(answer.detail);
  return answer;
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function button(text, label, action) {
  const made = element("button", text);
  made.type = "button";
  made.setAttribute("aria-label", label);
  made.addEventListener("click", action);
  return made;
}

function showHistory() {
  at("history").replaceChildren(...history.map((item, place) => {
    const line = element("li", `${item.title} `);
    line.append(button("✕", `Remove ${item.title}`, () => { history.splice(place, 1); changed(); }));
    return line;
  }));
}

function add(item) {
  history.push(item);
  at("search").value = "";
  at("found").replaceChildren();
  found = [];
  at("search").focus();
  changed();
}

async function search() {
  const query = at("search").value.trim();
  found = [];
  if (!query) { at("found").replaceChildren(); return false; }
  try {
    const { items } = await ask(`v1/items?most=8&query=${encodeURIComponent(query)}`);
    if (query !== at("search").value.trim()) return false;
    found = items;
    at("found").replaceChildren(...items.map((item) => {
      const line = document.createElement("li");
      line.append(button(item.title, `Add ${item.title}`, () => add(item)));
      return line;
    }));
    return true;
  } catch (error) { at("message").textContent = error.message; return false; }
}

function card(name, answer, seconds) {
  const made = document.createElement("article");
  made.append(element("h3", AGGREGATIONS[name]));
  const { encode, search, total } = answer.timing_ms;
  made.append(element("p", `model ${encode.toFixed(0)} ms, search ${search.toFixed(0)} ms, in all ${total.toFixed(0)} ms`
    + ` (here ${(1000 * seconds).toFixed(0)} ms)${answer.partial ? ", partial" : ""}`, "hint"));
  const list = document.createElement("ol");
  list.append(...answer.items.map((item) => {
    const line = element("li", `${item.title} `);
    line.append(element("span", item.score === null ? "∞" : item.score.toPrecision(4), "score"));
    return line;
  }));
  made.append(list);
  return made;
}

async function changed() {
  showHistory();
  const round = ++newest;
  if (!history.length) { at("lists").replaceChildren(); at("message").textContent = ""; return; }
  const request = {
    history: history.map((item) => item.item_id ?? { title: item.title }),
    k: Number(at("k").value) || 10,
  };
  try {
    const cards = await Promise.all(Object.keys(AGGREGATIONS).map(async (aggregation) => {
      const started = performance.now();
      const answer = await ask("v1/recommend", { ...request, aggregation });
      return card(aggregation, answer, (performance.now() - started) / 1000);
    }));
    if (round !== newest) return;
    at("lists").replaceChildren(...cards);
    at("message").textContent = "";
  } catch (error) {
    if (round !== newest) return;
    at("lists").replaceChildren();
    at("message").textContent = error.message;
  }
}

async function showServed() {
  try {
    const status = await ask("v1/status");
    at("served").textContent = `${status.items} items, ${status.rows} sequences in ${status.shards} shards; index`
      + ` ${status.snapshot}, model ${status.model}`;
  } catch (error) { at("message").textContent = error.message; }
}

let waiting;
at("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });
at("search").addEventListener("keydown", async (event) => {
  if (event.key !== "Enter" || !at("search").value.trim()) return;
  clearTimeout(waiting);
  if (await search()) add(found[0] ?? { title: at("search").value.trim() });
});
at("clear").addEventListener("click", () => { history.length = 0; changed(); });
at("k").addEventListener("change", changed);
at("key").addEventListener("change", () => { showServed(); changed(); });
showServed();
