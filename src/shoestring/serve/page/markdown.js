// Markdown to DOM nodes. Nothing is ever parsed as HTML: every character of the source ends up in a text node, so
// markup and scripts in a model's output stay text. Links go to http, https and mailto only; images are shown as links.
// Whatever a model writes, it takes time in proportion: no expression here looks at a line more than a few times, quotes
// and lists are followed DEEPEST deep, and a text longer than LONGEST is shown as it was written.
import { math } from "./math.js";

const make = (tag, children = [], attributes = {}) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...[].concat(children));
  return node;
};

const DEEPEST = 16;
const LONGEST = 400000;

export function markdown(source) {
  const root = document.createDocumentFragment();
  if (source.length > LONGEST) root.append(make("p", source));
  else blocks(source.replace(/\r\n?/g, "\n").split("\n"), root, 0);
  return root;
}

// ["```", "python"] of the line that opens a block of code.
function fenced(line) {
  const [, mark, rest] = line.match(/^ {0,3}(`{3,}|~{3,})(.*)$/) || [];
  return !mark || (mark[0] === "`" && rest.includes("`")) ? null : [mark, rest.trim().split(/\s/, 1)[0]];
}

// [level, text] of a heading, without the marks that may close it.
function headed(line) {
  const [, marks, rest] = line.match(/^ {0,3}(#{1,6})[ \t]+(\S.*)$/) || [];
  if (!marks) return null;
  const text = rest.trimEnd();
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  return [marks.length, end === 0 || /\s/.test(text[end - 1]) ? text.slice(0, end).trimEnd() : text];
}

const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

// Whether a line is the rule under a table's head.
function ruled(line) {
  const cells = line.trim().replace(/^\||\|$/g, "").split("|");
  return cells.length > 1 && cells.every((cell) => /^:?-+:?$/.test(cell.trim()));
}

function blocks(lines, into, depth) {
  if (depth > DEEPEST) return void into.append(make("p", lines.join("\n")));
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let found;
    if (!line.trim()) at += 1;
    else if ((found = fenced(line))) at = fence(lines, at, found, into);
    else if (/^\s*(\$\$|\\\[)/.test(line)) at = display(lines, at, into);
    else if ((found = headed(line))) {
      into.append(make(`h${Math.min(6, found[0] + 2)}`, inline(found[1])));
      at += 1;
    } else if (RULE.test(line)) {
      into.append(make("hr"));
      at += 1;
    } else if (/^ {0,3}>/.test(line)) {
      const start = at;
      while (at < lines.length && /^ {0,3}>/.test(lines[at])) at += 1;
      const quote = make("blockquote");
      blocks(lines.slice(start, at).map((l) => l.replace(/^ {0,3}> ?/, "")), quote, depth + 1);
      into.append(quote);
    } else if (ITEM.test(line)) at = list(lines, at, into, depth);
    else if (line.includes("|") && ruled(lines[at + 1] || "")) at = table(lines, at, into);
    else {
      const start = at;
      at += 1;
      while (at < lines.length && lines[at].trim() && !startsBlock(lines[at])) at += 1;
      into.append(make("p", inline(lines.slice(start, at).join("\n"))));
    }
  }
}

const startsBlock = (line) =>
  fenced(line) || headed(line) || RULE.test(line) || /^ {0,3}>/.test(line) || ITEM.test(line) || /^\s*(\$\$|\\\[)/.test(line);

function fence(lines, at, found, into) {
  const [mark, language] = found;
  const end = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}\\s*$`);
  const start = ++at;
  while (at < lines.length && !end.test(lines[at])) at += 1;
  const text = lines.slice(start, at).join("\n");
  const copy = make("button", "Copy", { class: "plain copy-code", type: "button" });
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text).catch(() => {});
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1200);
  });
  const head = make("div", [make("span", language || "text"), copy], { class: "code-head" });
  into.append(make("div", [head, make("pre", make("code", text), { tabindex: "0" })], { class: "code" }));
  return at + 1;
}

function display(lines, at, into) {
  const dollars = lines[at].trimStart().startsWith("$$");
  const [open, close] = dollars ? ["$$", "$$"] : ["\\[", "\\]"];
  let text = lines[at].slice(lines[at].indexOf(open) + 2);
  let end;
  while ((end = text.indexOf(close)) < 0 && at + 1 < lines.length) text += "\n" + lines[++at];
  const rest = end < 0 ? "" : text.slice(end + 2);
  into.append(make("div", math(end < 0 ? text : text.slice(0, end), true), { class: "display" }));
  if (rest.trim()) into.append(make("p", inline(rest)));
  return at + 1;
}

function list(lines, at, into, depth) {
  const [, indent, mark] = lines[at].match(ITEM);
  const ordered = /\d/.test(mark);
  const node = make(ordered ? "ol" : "ul", [], ordered && parseInt(mark) !== 1 ? { start: String(parseInt(mark)) } : {});
  while (at < lines.length) {
    const found = lines[at].match(ITEM);
    if (!found || found[1].length < indent.length || found[1].length > indent.length + 1 || /\d/.test(found[2]) !== ordered) break;
    const width = lines[at].length - found[3].length;
    const inner = [found[3]];
    at += 1;
    while (at < lines.length) {
      const line = lines[at];
      const deep = line.match(/^\s*/)[0].length;
      if (!line.trim()) {
        const next = lines[at + 1] || "";
        if (!next.trim() || next.match(/^\s*/)[0].length <= indent.length) break;
      } else if (deep <= indent.length) break;
      inner.push(line.slice(Math.min(deep, width)));
      at += 1;
    }
    while (at < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1] || "")) at += 1;
    const item = make("li");
    if (inner.length === 1 && !startsBlock(inner[0])) item.append(...inline(inner[0]));
    else blocks(inner, item, depth + 1);
    node.append(item);
  }
  into.append(node);
  return at;
}

function table(lines, at, into) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replace(/\\\|/g, "|"));
  const head = make("tr", cells(lines[at]).map((cell) => make("th", inline(cell), { scope: "col" })));
  const body = make("tbody");
  at += 2;
  while (at < lines.length && lines[at].includes("|") && lines[at].trim()) {
    body.append(make("tr", cells(lines[at]).map((cell) => make("td", inline(cell)))));
    at += 1;
  }
  into.append(make("div", make("table", [make("thead", head), body]), { class: "scroll", tabindex: "0" }));
  return at;
}

// Inline marks, tried in this order at every place; what matches none is text. The third says how one of those begins
// that may end anywhere: where one is not closed, none further on is, and it need not be looked for again.
const MARKS = [
  [/^\\([\\`*_{}[\]()#+\-.!|<>~$])/, (m) => m[1]],
  [/^(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)/, (m) => make("code", m[2].trim() || m[2])],
  [/^\\\(([\s\S]+?)\\\)/, (m) => math(m[1], false), /^\\\(/],
  [/^\$\$([\s\S]+?)\$\$/, (m) => math(m[1], true), /^\$\$/],
  [/^\$(?=[^\s$])([^$\n]*?[^\s$\\])\$(?!\d)/, (m) => math(m[1], false)],
  [/^\*\*\*(?=\S)([\s\S]+?\S)\*\*\*/, (m) => make("strong", make("em", inline(m[1]))), /^\*\*\*\S/],
  [/^\*\*(?=\S)([\s\S]*?\S)\*\*/, (m) => make("strong", inline(m[1])), /^\*\*\S/],
  [/^__(?=\S)([\s\S]*?\S)__/, (m) => make("strong", inline(m[1])), /^__\S/],
  [/^\*(?=[^\s*])([\s\S]*?[^\s*])\*(?!\*)/, (m) => make("em", inline(m[1])), /^\*[^\s*]/],
  [/^~~(?=\S)([\s\S]*?\S)~~/, (m) => make("del", inline(m[1])), /^~~\S/],
  [/^!\[([^\]]*)\]\(([^\s)]{1,2000})(?:\s[^)]{0,500})?\)/, (m) => link(m[2], [m[1] || "image"])],
  [/^\[([^\]]+)\]\(([^\s)]{1,2000})(?:\s+"[^"]{0,500}")?\)/, (m) => link(m[2], inline(m[1]))],
  [/^<(https?:\/\/[^\s<>]+)>/, (m) => link(m[1], [m[1]])],
  [/^https?:\/\/[^\s<>()]*[^\s<>().,;:!?'"\]]/, (m) => link(m[0], [m[0]])],
  [/^\\\n/, () => make("br")],
];

function link(address, children) {
  let url;
  try {
    url = new URL(address);
  } catch {
    url = null;
  }
  if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return make("span", children);
  return make("a", children, { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" });
}

function inline(text) {
  const nodes = [];
  const open = new Set(); // marks that are not closed any more
  const lastLink = text.lastIndexOf("](");
  let plain = "";
  let at = 0;
  while (at < text.length) {
    const rest = text.slice(at);
    const begins = rest[0] === "_" && !open.has("_") && /^_[^\s_]/.test(rest) && !/\w/.test(plain.at(-1) || "");
    const under = begins && rest.match(/^_(?=[^\s_])([\s\S]*?[^\s_])_(?!\w)/);
    if (begins && !under) open.add("_");
    let node = under ? make("em", inline(under[1])) : null;
    let size = under ? under[0].length : 0;
    if (rest[0] === " ") {
      // a run of them is one thing: a break at a line's end, else text
      const spaces = rest.match(/^ +/)[0].length;
      if (spaces > 1 && rest[spaces] === "\n") [node, size] = [make("br"), spaces + 1];
      else {
        plain += rest.slice(0, spaces);
        at += spaces;
        continue;
      }
    }
    if (!node && "\\`$*_~![<h".includes(rest[0])) {
      for (const [pattern, build, start] of MARKS) {
        if (open.has(pattern) || (at > lastLink && (rest[0] === "[" || rest[0] === "!"))) continue;
        const found = rest.match(pattern);
        if (!found && start?.test(rest)) open.add(pattern);
        if (found) {
          [node, size] = [build(found), found[0].length];
          break;
        }
      }
    }
    if (node === null) {
      plain += rest[0];
      at += 1;
      continue;
    }
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
    at += size;
  }
  if (plain) nodes.push(plain);
  return nodes;
}
