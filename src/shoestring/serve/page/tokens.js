// Token probabilities: each token tinted by how unlikely it was; hover, focus or arrow keys show what else it might
// have been. An entry is [text, logprob, [[text, logprob], ...]].
const tip = document.getElementById("tip");
const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 ? "100 %" : p >= 10 ? `${p.toFixed(1)} %` : p >= 0.1 ? `${p.toFixed(2)} %` : "< 0.1 %";
};
const shown = (text) => text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";

export const compact = (entry) => [entry.token, entry.logprob, entry.top_logprobs.map((top) => [top.token, top.logprob])];

export function tokenView(tokens) {
  const root = document.createElement("div");
  root.className = "tokens";
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "Tokens and their probabilities; arrow keys move");
  tokens.forEach((token, index) => {
    const span = document.createElement("span");
    span.className = "token";
    span.tabIndex = index ? -1 : 0;
    span.textContent = token[0] === "" ? "∅" : token[0].replace(/\n/g, "↵\n");
    span.setAttribute("role", "button");
    span.setAttribute("aria-label", describe(token));
    const doubt = 1 - Math.exp(token[1]);
    span.style.setProperty("--doubt", `${Math.round(100 * Math.sqrt(doubt))}%`);
    span.addEventListener("mouseenter", () => show(span, token));
    span.addEventListener("focus", () => show(span, token));
    span.addEventListener("mouseleave", hide);
    span.addEventListener("blur", hide);
    root.append(span);
  });
  root.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = step && (step > 0 ? event.target.nextSibling : event.target.previousSibling);
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  return root;
}

const describe = ([text, logprob, top]) =>
  `${shown(text)}, ${percent(logprob)}` + (top.length ? `; likeliest: ${top.map(([other, p]) => `${shown(other)} ${percent(p)}`).join(", ")}` : "");

function show(span, [text, logprob, top]) {
  const rows = top.some(([other]) => other === text) ? top : [...top, [text, logprob]];
  tip.replaceChildren(
    ...rows.map(([other, p]) => {
      const row = document.createElement("div");
      row.className = other === text ? "alternative taken" : "alternative";
      const bar = document.createElement("i");
      bar.style.width = `${Math.max(1, 100 * Math.exp(p))}%`;
      const name = document.createElement("span");
      name.textContent = shown(other);
      const value = document.createElement("b");
      value.textContent = percent(p);
      row.append(bar, name, value);
      return row;
    }),
  );
  tip.hidden = false;
  const box = span.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left), document.documentElement.clientWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : box.bottom + 8}px`;
}

export function hide() {
  tip.hidden = true;
}
