"use strict";
// Text from data is only ever set as textContent: whatever it holds, it is shown, never run.
const byId = (id) => document.getElementById(id);
const KEYS = {
  1: "left", ArrowLeft: "left", 2: "tie", ArrowDown: "tie", 3: "right", ArrowRight: "right", 0: "skip", s: "skip",
  u: "undo", U: "undo", Backspace: "undo",
};
const PENDING = "fasttrain-review-pending", NAME = "fasttrain-review-name";
let rater = "", shown = null, busy = false, fixed = false; // fixed: the command named the reviewer

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function say(text) {
  byId("status").textContent = text;
  byId("status").hidden = !text;
}

// Tries until the server has answered: a judgement is not given up because the server was away.
async function ask(path, body) {
  for (let wait = 300; ; wait = Math.min(2 * wait, 3000)) {
    try {
      const options = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
      const reply = await fetch(path, options);
      if (reply.ok) {
        say("");
        return await reply.json();
      }
      say(await reply.text());
      return null;
    } catch {
      say("The review command does not answer. Start it again with the same port: this page goes on by itself, nothing is lost.");
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}

function picture(item, number) {
  const image = new Image();
  image.alt = `Picture ${number + 1} of this question`;
  image.addEventListener("error", () => image.replaceWith(element("p", "This picture cannot be shown.", "broken")));
  image.src = `/image?id=${encodeURIComponent(item.id)}&n=${number}`;
  return image;
}

function show(state) {
  if (!state) return;
  shown = state.item;
  byId("enter").hidden = true;
  byId("work").hidden = !shown;
  byId("done").hidden = !!shown;
  byId("fill").style.width = `${(100 * state.done) / state.total}%`;
  byId("bar").setAttribute("aria-valuemax", state.total);
  byId("bar").setAttribute("aria-valuenow", state.done);
  byId("count").textContent = `${state.done} of ${state.total} judged`;
  byId("who").textContent = state.rater;
  byId("leave").hidden = fixed;
  byId("undo").disabled = byId("undo-last").disabled = !state.done;
  document.querySelectorAll("article").forEach((side) => side.classList.remove("picked"));
  if (shown) {
    byId("images").replaceChildren(...Array.from({ length: shown.images }, (_, number) => picture(shown, number)));
    byId("prompt").replaceChildren(...shown.messages.map(([role, text]) => {
      const line = element("p");
      if (shown.messages.length > 1) line.append(element("b", `${role}: `));
      line.append(text);
      return line;
    }));
    byId("left").textContent = shown.left;
    byId("right").textContent = shown.right;
    window.scrollTo(0, 0);
  }
  if (byId("agreement").open) figures();
}

async function judge(verdict) {
  if (!shown || busy) return;
  busy = true;
  const judgement = { rater, id: shown.id, verdict };
  if (verdict === "left" || verdict === "right") byId(verdict).parentElement.classList.add("picked");
  localStorage.setItem(PENDING, JSON.stringify(judgement)); // survives a reload while the server is away
  show(await keep(judgement));
  busy = false;
}

async function keep(judgement) {
  const state = await ask("/judge", judgement);
  localStorage.removeItem(PENDING);
  return state;
}

async function undo() {
  if (busy || byId("undo").disabled) return;
  busy = true;
  show(await ask("/undo", { rater }));
  busy = false;
}

const percent = (value) => (value === null ? "-" : `${(100 * value).toFixed(1)} %`);
const kappa = (value) => (value === null ? "-" : value.toFixed(2));

async function figures() {
  const found = await ask("/agreement");
  if (!found) return;
  const table = element("table");
  const row = (tag, ...cells) => {
    const line = element("tr");
    line.append(...cells.map((cell) => element(tag, cell)));
    table.append(line);
  };
  row("th", "", "agree with the machine", "share", "95 %", "kappa", "no difference", "skipped");
  const add = (name, entry) => row("td", name, `${entry.agree} of ${entry.decided}`, percent(entry.share),
    entry.low === null ? "-" : `${percent(entry.low)} to ${percent(entry.high)}`, kappa(entry.kappa), entry.ties, entry.skips);
  add("all", found.all);
  Object.entries(found.by_rater).forEach(([name, entry]) => add(`reviewer ${name}`, entry));
  Object.entries(found.by_margin).forEach(([name, entry]) => add(`margin ${name}`, entry));
  Object.entries(found.by_attribute).forEach(([name, entry]) =>
    row("td", name, `${entry.agree} of ${entry.n}`, percent(entry.share), "", kappa(entry.kappa)));
  Object.entries(found.between_raters.pairs).forEach(([name, entry]) =>
    row("td", name, `the same on ${entry.same} of ${entry.n}`, percent(entry.share), "", kappa(entry.kappa)));
  byId("figures").replaceChildren(table);
}

async function start(name) {
  rater = name;
  localStorage.setItem(NAME, name);
  const pending = JSON.parse(localStorage.getItem(PENDING) || "null");
  if (pending && pending.rater === rater) await keep(pending);
  show(await ask(`/next?rater=${encodeURIComponent(rater)}`));
}

async function greet() {
  const about = await ask("/next");
  fixed = !!(about && about.rater);
  const name = (about && about.rater) || localStorage.getItem(NAME);
  if (name) return start(name);
  if (about && about.known.length) byId("known").textContent = `: ${about.known.join(", ")}`;
  byId("enter").hidden = false;
  byId("name").focus();
}

byId("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  start(byId("name").value.trim());
});
document.querySelectorAll("[data-verdict]").forEach((button) =>
  button.addEventListener("click", () => { button.blur(); judge(button.dataset.verdict); }));
byId("leave").addEventListener("click", () => {
  if (busy) return;
  localStorage.removeItem(NAME);
  location.reload();
});
byId("undo").addEventListener("click", () => { byId("undo").blur(); undo(); });
byId("undo-last").addEventListener("click", undo);
byId("who").addEventListener("click", () => { localStorage.removeItem(NAME); location.reload(); });
byId("who").title = "Another name";
byId("agreement").addEventListener("toggle", () => byId("agreement").open && figures());
document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const action = KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  if (action === "undo") undo();
  else judge(action);
});
greet();
