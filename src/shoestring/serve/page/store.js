// Conversations, kept in this browser. A conversation is a tree of turns: a turn is one question with its answers, of
// one or two models and any number of versions each; editing a question makes a sibling turn, and so a branch.
const PLACE = "shoestring.conversations";
const SETTINGS = "shoestring.settings";
const ROOT = "root";

const id = () => Math.random().toString(36).slice(2, 10) + Date.now().toString(36);

const DEFAULTS = { temperature: 0.7, top_p: 1, max_tokens: "", seed: "", thinking: "", probabilities: true, system: "", theme: "auto", models: [], compare: false };
const chosen = Object.entries(Object(read(SETTINGS, {}))).filter(
  ([name, value]) => name in DEFAULTS && typeof value === typeof DEFAULTS[name] && Array.isArray(value) === Array.isArray(DEFAULTS[name]),
);
export const settings = { ...DEFAULTS, ...Object.fromEntries(chosen) };
if (!["auto", "light", "dark"].includes(settings.theme)) settings.theme = "auto";

export function saveSettings() {
  write(SETTINGS, settings);
}

function read(place, fallback) {
  try {
    return JSON.parse(localStorage.getItem(place)) ?? fallback;
  } catch {
    return fallback;
  }
}

function write(place, value) {
  try {
    localStorage.setItem(place, JSON.stringify(value));
    return true;
  } catch {
    return false; // no room, or no storage at all
  }
}

const object = (value) => Boolean(value) && typeof value === "object" && !Array.isArray(value);

// What is kept may be of another program, or older, or cut: a conversation that is not whole is left out, and the page
// still opens.
function whole(conversation) {
  const { id, title, turns, children, active } = object(conversation) ? conversation : {};
  return (
    typeof id === "string" && typeof title === "string" && [turns, children, active].every(object) && Object.values(children).every(Array.isArray) &&
    Object.values(turns).every(
      (turn) =>
        object(turn) && typeof turn.question === "string" && object(turn.answers) && object(turn.chosen) && children[turn.parent]?.includes(turn.id) &&
        Object.entries(turn.answers).every(([slot, list]) => Array.isArray(list) && list.every((answer) => object(answer) && typeof answer.text === "string") && list[turn.chosen[slot]]),
    )
  );
}

const kept = (found) => (Array.isArray(found) ? found.filter(whole) : []);

export class Store {
  constructor() {
    this.all = kept(read(PLACE, []));
    this.current = this.all[0] || null;
  }

  // Another tab of this browser has saved: its new and newer conversations come here, those it deleted go; the one that
  // is open here stays as it is. Whether anything changed.
  heard(event) {
    if (event.key !== PLACE) return false;
    const parsed = (text) => {
      try {
        return kept(JSON.parse(text));
      } catch {
        return [];
      }
    };
    const [before, now] = [parsed(event.oldValue), parsed(event.newValue)];
    const gone = new Set(before.map((one) => one.id).filter((id) => !now.some((one) => one.id === id)));
    const theirs = new Map(now.map((one) => [one.id, one]));
    const mine = this.all.filter((one) => one === this.current || !gone.has(one.id));
    this.all = mine.map((one) => (one !== this.current && theirs.get(one.id)?.updated >= one.updated ? theirs.get(one.id) : one));
    const here = new Set(this.all.map((one) => one.id));
    this.all.push(...now.filter((one) => !here.has(one.id)));
    this.all.sort((a, b) => (b.updated || 0) - (a.updated || 0));
    return true;
  }

  // Save soon; when there is no room, first the token probabilities of older conversations go, then the oldest.
  save() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.saveNow(), 200);
  }

  saveNow() {
    clearTimeout(this.timer);
    for (const conversation of [...this.all].reverse()) {
      if (write(PLACE, this.all)) return;
      for (const turn of Object.values(conversation.turns)) for (const list of Object.values(turn.answers)) for (const answer of list) delete answer.tokens;
    }
    while (this.all.length > 1 && !write(PLACE, this.all)) this.all.pop();
  }

  begin() {
    const empty = this.all.find((conversation) => !Object.keys(conversation.turns).length);
    this.current = empty || { id: id(), title: "New conversation", updated: Date.now(), turns: {}, children: {}, active: {} };
    this.all = [this.current, ...this.all.filter((conversation) => conversation !== this.current)];
    return this.current;
  }

  open(wanted) {
    this.current = this.all.find((conversation) => conversation.id === wanted) || this.current;
  }

  remove(wanted) {
    this.all = this.all.filter((conversation) => conversation.id !== wanted);
    if (this.current?.id === wanted) this.current = this.all[0] || null;
    this.save();
  }

  clear() {
    this.all = [];
    this.current = null;
    this.saveNow();
  }

  // The turns that are shown: from the root along the active branch.
  path() {
    const found = [];
    let place = ROOT;
    while (this.current) {
      const turn = this.current.turns[this.current.active[place]];
      if (!turn) break;
      found.push(turn);
      place = turn.id;
    }
    return found;
  }

  ask(text, parent = null) {
    const conversation = this.current || this.begin();
    const place = parent || ROOT;
    const turn = { id: id(), parent: place, question: text, answers: {}, chosen: {} };
    conversation.turns[turn.id] = turn;
    (conversation.children[place] ||= []).push(turn.id);
    conversation.active[place] = turn.id;
    if (place === ROOT && conversation.children[ROOT].length === 1) conversation.title = text.trim().slice(0, 60) || "New conversation";
    conversation.updated = Date.now();
    this.all = [conversation, ...this.all.filter((other) => other !== conversation)];
    this.save();
    return turn;
  }

  siblings(turn) {
    const list = this.current.children[turn.parent];
    return { list, at: list.indexOf(turn.id) };
  }

  choose(turn, step) {
    const { list, at } = this.siblings(turn);
    this.current.active[turn.parent] = list[Math.min(list.length - 1, Math.max(0, at + step))];
    this.save();
  }

  answer(turn, slot, model) {
    const answer = { model, text: "", thinking: "", state: "waiting", began: Date.now(), tokens: [] };
    (turn.answers[slot] ||= []).push(answer);
    turn.chosen[slot] = turn.answers[slot].length - 1;
    return answer;
  }

  // What goes to a model: every turn before, with the chosen answer of its own column, or the first one's.
  messages(turn, slot, system) {
    const found = system ? [{ role: "system", content: system }] : [];
    const path = this.path();
    for (const each of path.slice(0, path.indexOf(turn) + 1)) {
      found.push({ role: "user", content: each.question });
      if (each === turn) break;
      const column = each.answers[slot]?.length ? slot : 0;
      const answer = each.answers[column]?.[each.chosen[column] ?? 0];
      if (answer?.text) found.push({ role: "assistant", content: answer.text });
    }
    return found;
  }

  export() {
    return JSON.stringify({ schema: 1, exported: new Date().toISOString(), conversations: this.all }, null, 2);
  }
}
