// The chat page: what happens when. What it looks like is view.js, what is kept is store.js.
import { Store, saveSettings, settings } from "./store.js";
import { Refused, getJSON, hasKey, healthy, setKey, stream } from "./stream.js";
import { compact, hide } from "./tokens.js";
import { answerView, emptyView, fill, make, turnView } from "./view.js";

const $ = (name) => document.getElementById(name);
const store = new Store();
const running = new Map(); // "turn/slot" -> AbortController
let models = [];
let about = { examples: [] };

const say = (text) => ($("status").textContent = text);
const slots = () => (settings.compare && models.length > 1 ? [0, 1] : [0]);
const nameOf = (slot) => settings.models[slot] ?? models[Math.min(slot, models.length - 1)]?.id;

// ---- showing
function show() {
  const path = store.path();
  hide();
  $("thread").classList.toggle("blank", !path.length);
  const names = slots().map(nameOf).filter(Boolean);
  $("thread").replaceChildren(...(path.length ? path.map((turn) => turnView(turn, store, act)) : names.length ? [emptyView(about, models, names, ask)] : []));
  list();
  buttons();
}

function list() {
  $("conversations").replaceChildren(
    ...store.all
      .filter((conversation) => Object.keys(conversation.turns).length)
      .map((conversation) =>
        make(
          "div",
          { class: "entry" },
          make("button", { class: "title", type: "button", "aria-current": conversation === store.current ? "true" : undefined, onclick: () => (store.open(conversation.id), drawer(false), show(), bottom(true)) }, conversation.title),
          make("button", { class: "icon", type: "button", "aria-label": `Delete ${conversation.title}`, onclick: () => (store.remove(conversation.id), show()) }, "×"),
        ),
      ),
  );
}

function buttons() {
  const busy = running.size > 0;
  $("send").textContent = busy ? "■" : "↑";
  $("send").setAttribute("aria-label", busy ? "Stop" : "Send");
  $("send").classList.toggle("stop", busy);
  $("compare").hidden = models.length < 2;
  $("compare").setAttribute("aria-pressed", String(slots().length > 1));
  $("second").hidden = $("versus").hidden = slots().length < 2;
  document.body.classList.toggle("comparing", slots().length > 1);
}

const atBottom = () => $("thread").scrollHeight - $("thread").scrollTop - $("thread").clientHeight < 80;
const bottom = (force) => (force || atBottom()) && ($("thread").scrollTop = $("thread").scrollHeight);
const nodeOf = (turn, slot) => document.querySelector(`[data-turn="${turn.id}"] [data-slot="${slot}"]`);

function refresh(turn, slot) {
  const follow = atBottom();
  const node = nodeOf(turn, slot);
  if (node) fill(node, turn, slot, act);
  if (follow) bottom(true);
}

// ---- asking
function ask(text, parent) {
  if (!text.trim() || !models.length) return;
  const last = store.path().at(-1);
  const turn = store.ask(text, parent ?? last?.id);
  for (const slot of slots()) begin(turn, slot);
  show();
  bottom(true);
}

function begin(turn, slot, model = nameOf(slot)) {
  const answer = store.answer(turn, slot, model);
  const control = new AbortController();
  const place = `${turn.id}/${slot}`;
  running.set(place, control);
  const clock = setInterval(() => !answer.text && refresh(turn, slot), 100);
  hold(turn, slot, answer, control).finally(() => {
    clearInterval(clock);
    running.delete(place);
    refresh(turn, slot);
    buttons();
    store.save();
    say(answer.error ? `${answer.model}: ${answer.error}` : `${answer.model} has answered.`);
  });
}

function request(turn, slot, model) {
  const number = (value) => (value === "" || value == null ? undefined : Number(value));
  return {
    model,
    messages: store.messages(turn, slot, settings.system.trim()),
    stream: true,
    stream_options: { include_usage: true },
    temperature: settings.temperature,
    top_p: settings.top_p,
    max_tokens: number(settings.max_tokens),
    seed: number(settings.seed),
    thinking: settings.thinking ? { type: settings.thinking } : undefined,
    ...(settings.probabilities ? { logprobs: true, top_logprobs: 5 } : {}),
  };
}

async function hold(turn, slot, answer, control) {
  let drawn = 0;
  let took = 0;
  const draw = () => {
    if (drawn) return;
    drawn = setTimeout(
      () => {
        drawn = 0;
        const began = performance.now();
        refresh(turn, slot);
        took = performance.now() - began;
      },
      Math.max(40, 5 * took), // a long answer is drawn less often: the page has to stay at hand
    );
  };
  const before = answer.text;
  try {
    await stream(request(turn, slot, answer.model), control.signal, (chunk) => {
      hear(answer, chunk);
      draw();
    });
    answer.state = "done";
    answer.timings ??= measured(answer);
    banner("");
  } catch (error) {
    answer.state = error.name === "AbortError" ? "stopped" : "failed";
    if (error instanceof Refused) [answer.error, answer.wait] = [error.message, error.wait];
    else if (error.name !== "AbortError") {
      answer.error = answer.text !== before || answer.thinking ? "The server went away in the middle." : "The server cannot be reached.";
      watch();
    }
    if (error.status === 401) openSettings(true);
  } finally {
    clearTimeout(drawn);
    if (answer.thinkingBegan && answer.thinkingMs == null) answer.thinkingMs = Date.now() - answer.thinkingBegan;
  }
}

// What a server does not tell of its times is measured here.
function measured(answer) {
  const spent = Date.now() - answer.firstAt;
  const later = (answer.usage?.completion_tokens || 0) - 1;
  return { first_token_ms: answer.firstAt - answer.began, predicted_per_second: spent > 0 && later > 0 ? (1000 * later) / spent : null };
}

function hear(answer, chunk) {
  answer.state = "streaming";
  if (chunk.usage) [answer.usage, answer.timings] = [chunk.usage, chunk.timings];
  const choice = chunk.choices[0];
  if (!choice) return;
  const thought = choice.delta.reasoning_content ?? choice.delta.reasoning;
  if (thought) {
    answer.thinkingBegan ??= Date.now();
    answer.thinking += thought;
  }
  if (choice.delta.content) {
    if (answer.thinkingBegan && answer.thinkingMs == null) answer.thinkingMs = Date.now() - answer.thinkingBegan;
    answer.text += choice.delta.content;
  }
  if (thought || choice.delta.content) answer.firstAt ??= Date.now();
  if (thought || choice.delta.content) answer.pieces = (answer.pieces || 0) + 1;
  for (const entry of choice.logprobs?.content || []) answer.tokens.push(compact(entry));
  if (choice.finish_reason) answer.finish = choice.finish_reason;
}

const stop = () => running.forEach((control) => control.abort());

const act = {
  regenerate(turn, slot) {
    const model = slots().includes(slot) ? nameOf(slot) : turn.answers[slot][turn.chosen[slot]].model;
    begin(turn, slot, model);
    nodeOf(turn, slot).replaceWith(answerView(turn, slot, act));
    buttons();
  },
  version(turn, slot, step) {
    turn.chosen[slot] = Math.min(turn.answers[slot].length - 1, Math.max(0, turn.chosen[slot] + step));
    nodeOf(turn, slot).replaceWith(answerView(turn, slot, act));
    store.save();
  },
  branch(turn, step) {
    store.choose(turn, step);
    show();
  },
  tokens(turn, slot) {
    const answer = turn.answers[slot][turn.chosen[slot]];
    answer.showTokens = !answer.showTokens;
    refresh(turn, slot);
    hide();
  },
  edit(turn) {
    const bubble = document.querySelector(`[data-turn="${turn.id}"] .question`);
    const text = make("textarea", { "aria-label": "Edit the question", rows: "3" });
    text.value = turn.question;
    const done = () => (text.value.trim() && text.value !== turn.question ? ask(text.value, turn.parent) : show());
    const form = make("form", { class: "editing", onsubmit: (event) => (event.preventDefault(), done()) }, text, make("div", { class: "tools" }, make("button", { type: "submit" }, "Ask this instead"), make("button", { type: "button", class: "plain", onclick: show }, "Cancel")));
    text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey) (event.preventDefault(), done());
      if (event.key === "Escape") (event.stopPropagation(), show());
    });
    bubble.replaceChildren(form);
    text.focus();
  },
};

// ---- the server gone and back
let watching = false;
async function watch() {
  if (watching) return;
  watching = true;
  banner("The server cannot be reached. Looking for it…");
  while (!(await healthy())) await new Promise((done) => setTimeout(done, 1000));
  watching = false;
  banner("The server is back.");
  setTimeout(() => $("banner").textContent === "The server is back." && banner(""), 4000);
  await load();
}

function banner(text) {
  $("banner").textContent = text;
  $("banner").hidden = !text;
}

let refused = false; // for want of a key that is known
async function load() {
  try {
    [about, models] = await Promise.all([getJSON("/page/about.json"), getJSON("/v1/models").then((found) => found.data)]);
  } catch (error) {
    if (error instanceof Refused && error.status === 401) {
      refused = true;
      banner(hasKey() ? `The API key is refused: ${error.message}` : "This server wants an API key: enter yours in the settings.");
      openSettings(true);
    } else if (error instanceof Refused) banner(error.message);
    else watch();
    return;
  }
  for (const slot of [0, 1]) {
    const known = models.some((model) => model.id === settings.models[slot]);
    if (!known) settings.models[slot] = models[Math.min(slot, models.length - 1)]?.id;
    const options = models.map((model) => make("option", { value: model.id }, model.id));
    $(`model-${slot}`).replaceChildren(...options);
    $(`model-${slot}`).value = settings.models[slot];
  }
  if (refused) banner("");
  refused = false;
  $("key").placeholder = about.keys ? "sk-…" : "None needed";
  if (!running.size) show();
}

// ---- controls
function openSettings(open) {
  $("settings").hidden = !open;
  $("settings-open").setAttribute("aria-expanded", String(open));
  if (open) $(about.keys && !hasKey() ? "key" : "system").focus();
  else $("settings-open").focus();
}

function drawer(open) {
  document.body.classList.toggle("drawer", open);
  $("scrim").hidden = !open;
  $("menu").setAttribute("aria-expanded", String(open));
}

const THEMES = { auto: "as the system", light: "light", dark: "dark" };
function theme() {
  if (settings.theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = settings.theme;
  $("theme").textContent = settings.theme[0].toUpperCase() + settings.theme.slice(1);
  $("theme").setAttribute("aria-label", `Colours: ${THEMES[settings.theme]}`);
}

function wire() {
  const text = $("composer-text");
  const grow = () => {
    text.style.height = "auto";
    text.style.height = `${Math.min(text.scrollHeight, window.innerHeight * 0.4)}px`;
  };
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running.size) return stop();
    const question = text.value;
    text.value = "";
    grow();
    ask(question);
  });
  text.addEventListener("input", grow);
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!running.size) $("composer").requestSubmit();
    }
    if (event.key === "ArrowUp" && !text.value && store.path().length) (event.preventDefault(), act.edit(store.path().at(-1)));
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (running.size) stop();
    else if (!$("settings").hidden) openSettings(false);
    else drawer(false);
  });
  $("new").addEventListener("click", () => (store.begin(), drawer(false), show(), text.focus()));
  $("menu").addEventListener("click", () => drawer(!document.body.classList.contains("drawer")));
  $("scrim").addEventListener("click", () => drawer(false));
  $("settings-open").addEventListener("click", () => openSettings($("settings").hidden));
  $("settings-close").addEventListener("click", () => openSettings(false));
  $("compare").addEventListener("click", () => ((settings.compare = !settings.compare), saveSettings(), store.path().length ? buttons() : show()));
  for (const slot of [0, 1]) {
    $(`model-${slot}`).addEventListener("change", (event) => ((settings.models[slot] = event.target.value), saveSettings(), store.path().length || show()));
  }
  for (const name of ["temperature", "top_p", "max_tokens", "seed", "thinking", "system"]) {
    const field = $(name);
    const output = document.querySelector(`output[for="${name}"]`);
    field.value = settings[name];
    if (output) output.textContent = field.value;
    field.addEventListener("input", () => {
      settings[name] = field.type === "range" ? Number(field.value) : field.value;
      if (output) output.textContent = field.value;
      saveSettings();
    });
  }
  $("probabilities").checked = settings.probabilities;
  $("probabilities").addEventListener("change", (event) => ((settings.probabilities = event.target.checked), saveSettings()));
  $("key").addEventListener("change", (event) => (setKey(event.target.value), load()));
  $("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    settings.theme = names[(names.indexOf(settings.theme) + 1) % names.length];
    saveSettings();
    theme();
  });
  $("export").addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([store.export()], { type: "application/json" }));
    make("a", { href: url, download: "conversations.json" }).click();
    URL.revokeObjectURL(url);
  });
  $("forget").addEventListener("click", () => confirm("Delete all conversations in this browser?") && (store.clear(), show()));
  // A phone that puts the page aside may never come back to it: what is there by then is kept.
  for (const left of ["beforeunload", "pagehide"]) window.addEventListener(left, () => store.saveNow());
  document.addEventListener("visibilitychange", () => document.hidden && store.saveNow());
  window.addEventListener("storage", (event) => {
    if (!store.heard(event)) return;
    if (running.size) list();
    else show();
  });
}

theme();
wire();
for (const conversation of store.all) {
  for (const turn of Object.values(conversation.turns)) {
    for (const versions of Object.values(turn.answers)) {
      for (const answer of versions) if (["waiting", "streaming"].includes(answer.state)) answer.state = "stopped";
    }
  }
}
await load();
$("composer-text").focus();
