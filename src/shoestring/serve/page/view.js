// The thread as DOM: questions, answers side by side, thinking, figures. Everything from a model goes through text
// nodes (markdown.js); nothing is ever set as HTML.
import { markdown } from "./markdown.js";
import { tokenView } from "./tokens.js";

export const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null && child !== false));
  return node;
};

const button = (text, label, onclick, more = {}) => make("button", { class: "plain", type: "button", "aria-label": label, title: label, onclick, ...more }, text);
const seconds = (ms) => (ms < 9950 ? `${(ms / 1000).toFixed(1)} s` : `${Math.round(ms / 1000)} s`);
export const dollars = (usd) => (usd >= 0.01 ? `$${usd.toFixed(3)}` : usd > 0 ? `$${usd.toPrecision(2)}` : "");

// One turn. `act` holds what the buttons do.
export function turnView(turn, store, act) {
  const { list, at } = store.siblings(turn);
  const question = make(
    "article",
    { class: "question", "aria-label": "Your question" },
    make("div", { class: "bubble" }, turn.question),
    make(
      "div",
      { class: "tools" },
      list.length > 1 && stepper("Question", at, list.length, (step) => act.branch(turn, step)),
      button("Edit", "Edit the question", () => act.edit(turn)),
      button("Copy", "Copy the question", (event) => copy(event.target, turn.question)),
    ),
  );
  const slots = Object.keys(turn.answers).map(Number).sort();
  const answers = make("div", { class: slots.length > 1 ? "answers two" : "answers" });
  for (const slot of slots) answers.append(answerView(turn, slot, act));
  return make("div", { class: "turn", "data-turn": turn.id }, question, answers);
}

function stepper(what, at, count, go) {
  return make(
    "span",
    { class: "stepper", role: "group", "aria-label": `${what} versions` },
    button("‹", `Earlier version of this ${what.toLowerCase()}`, () => go(-1), { disabled: at === 0 }),
    make("span", {}, `${at + 1}/${count}`),
    button("›", `Later version of this ${what.toLowerCase()}`, () => go(1), { disabled: at === count - 1 }),
  );
}

export function answerView(turn, slot, act) {
  const versions = turn.answers[slot];
  const answer = versions[turn.chosen[slot]];
  const node = make("article", { class: `answer ${slot ? "r-b" : "r-a"}`, "data-slot": slot, "aria-label": `Answer of ${answer.model}` });
  node.append(
    make("header", {}, make("span", { class: "dot", "aria-hidden": "true" }), make("b", {}, answer.model)),
    make("div", { class: "body" }),
    make("footer", {}),
  );
  fill(node, turn, slot, act);
  return node;
}

// Bring an answer's node up to date; called for every few tokens while it streams.
export function fill(node, turn, slot, act) {
  const versions = turn.answers[slot];
  const answer = versions[turn.chosen[slot]];
  const streaming = answer.state === "waiting" || answer.state === "streaming";
  node.classList.toggle("streaming", streaming);
  node.setAttribute("aria-busy", String(streaming));
  const body = node.querySelector(".body");
  const parts = [];
  if (answer.thinking || answer.thinkingBegan) thinking(body, answer, streaming);
  else body.querySelector(":scope > .thinking")?.remove();
  if (answer.showTokens && answer.tokens?.length) parts.push(tokenView(answer.tokens));
  else if (answer.text) parts.push(said(answer.text));
  else if (streaming) parts.push(make("p", { class: "waiting" }, answer.queued ? "Waiting for a turn…" : answer.thinkingBegan ? "" : "…"));
  if (answer.error) parts.push(trouble(answer, () => act.regenerate(turn, slot)));
  else if (answer.state === "stopped") parts.push(make("p", { class: "note" }, "Stopped."));
  else if (answer.finish === "length") parts.push(make("p", { class: "note" }, "Cut off: the longest answer allowed."));
  while (body.lastChild && !body.lastChild.matches?.(".thinking")) body.lastChild.remove();
  body.append(...parts);
  node.querySelector("footer").replaceChildren(...(streaming ? [live(answer)] : foot(turn, slot, answer, versions, act)));
}

// What cannot be drawn is shown as it was written: no answer may keep the page from opening.
function said(text) {
  try {
    return make("div", { class: "said" }, markdown(text));
  } catch {
    return make("div", { class: "said" }, make("p", {}, text));
  }
}

// The thinking stays the same element while it grows: who is opening it, or reading it, is not thrown out.
function thinking(body, answer, streaming) {
  const busy = streaming && !answer.text;
  const time = answer.thinkingMs ?? Date.now() - answer.thinkingBegan;
  const count = answer.usage?.completion_tokens_details?.reasoning_tokens;
  const words = busy ? `Thinking, ${seconds(time)}` : `Thought for ${seconds(time)}${count ? `, ${count} tokens` : ""}`;
  let node = body.querySelector(":scope > .thinking");
  if (!node) body.prepend((node = make("details", {}, make("summary"), make("div", { class: "thought" }))));
  node.className = busy ? "thinking busy" : "thinking";
  const [summary, thought] = node.children;
  if (summary.textContent !== words) summary.textContent = words;
  const shown = thought.textContent.length;
  if (answer.thinking.startsWith(thought.textContent)) thought.append(answer.thinking.slice(shown));
  else thought.textContent = answer.thinking;
}

function trouble(answer, again) {
  const wait = answer.wait ? ` Try again in ${answer.wait} s.` : "";
  return make("p", { class: "trouble", role: "alert" }, `${answer.error}${wait} `, button("Try again", "Ask this model again", again));
}

function live(answer) {
  const spent = Date.now() - answer.began;
  return make("span", { class: "figures" }, answer.state === "waiting" ? seconds(spent) : `${answer.pieces || 0} pieces, ${seconds(spent)}`);
}

function foot(turn, slot, answer, versions, act) {
  return [
    make(
      "div",
      { class: "tools" },
      versions.length > 1 && stepper("Answer", turn.chosen[slot], versions.length, (step) => act.version(turn, slot, step)),
      button("Again", "Answer once more", () => act.regenerate(turn, slot)),
      button("Copy", "Copy the answer", (event) => copy(event.target, answer.text)),
      answer.tokens?.length > 0 &&
        button("Tokens", "Show token probabilities", () => act.tokens(turn, slot), { "aria-pressed": String(Boolean(answer.showTokens)) }),
    ),
    make("span", { class: "figures" }, ...figures(answer)),
  ];
}

function figures(answer) {
  const { usage, timings } = answer;
  if (!usage) return [];
  const cached = usage.prompt_tokens_details?.cached_tokens;
  const parts = [
    timings?.predicted_per_second && [`${timings.predicted_per_second.toFixed(timings.predicted_per_second < 10 ? 1 : 0)} tokens/s`, "Speed after the first token"],
    timings && [`${seconds(timings.first_token_ms)} to the first`, "From asking to the first token, waiting included"],
    [`${usage.prompt_tokens} + ${usage.completion_tokens} tokens`, `Prompt${cached ? ` (${cached} from the cache)` : ""} and answer`],
    dollars(usage.cost_usd || 0) && [dollars(usage.cost_usd), "Cost of this answer"],
  ].filter(Boolean);
  return parts.map(([text, title]) => make("span", { title }, text));
}

async function copy(target, text) {
  const before = target.textContent;
  try {
    await navigator.clipboard.writeText(text);
    target.textContent = "Copied";
  } catch {
    target.textContent = "Not allowed";
  }
  setTimeout(() => (target.textContent = before), 1200);
}

export function emptyView(about, models, names, ask) {
  const described = names.map((name) => {
    const size = models.find((model) => model.id === name)?.meta?.n_params;
    return size ? `${name}, ${size >= 1e9 ? `${(size / 1e9).toFixed(1)} B` : size >= 1e6 ? `${(size / 1e6).toFixed(1)} M` : `${Math.round(size / 1e3)} k`} parameters` : name;
  });
  const groups = new Map();
  for (const example of about.examples || []) groups.set(example.task, [...(groups.get(example.task) || []), example]);
  return make(
    "div",
    { class: "empty" },
    make("h1", {}, names.length > 1 ? "Ask them both." : "Ask."),
    make("p", { class: "caption" }, described.join(" · ")),
    groups.size > 0 && make("p", { class: "lead" }, "It was trained on problems like these:"),
    make(
      "div",
      { class: "examples" },
      ...[...groups].map(([task, list]) =>
        make(
          "section",
          { "aria-label": task },
          make("h2", {}, task),
          ...list.map((example) => make("button", { class: "example", type: "button", onclick: () => ask(example.text) }, make("span", {}, example.kind), example.text)),
        ),
      ),
    ),
  );
}
