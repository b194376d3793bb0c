// Markdown to DOM nodes. Nothing is ever parsed as HTML: every character of the source ends up in a text node, so
// markup and scripts in a model's output stay text. Links go to http, https and mailto only; images are shown as links.
import { math } from "./math.js";

const make = (tag, children = [], attributes = {}) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...[].concat(children));
  return node;
};

export function markdown(source) {
  const root = document.createDocumentFragment();
  blocks(source.replace(/\r\n?/g, "\n").split("\n"), root);
  return root;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const TABLE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*$/;

function blocks(lines, into) {
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let found;
    if (!line.trim()) at += 1;
    else if ((found = line.match(FENCE))) at = fence(lines, at, found, into);
    else if (/^\s*(\$\$|\\\[)/.test(line)) at = display(lines, at, into);
    else if ((found = line.match(HEADING))) {
      into.append(make(`h${Math.min(6, found[1].length + 2)}`, inline(found[2])));
      at += 1;
    } else if (RULE.test(line)) {
      into.append(make("hr"));
      at += 1;
    } else if (/^ {0,3}>/.test(line)) {
      const start = at;
      while (at < lines.length && /^ {0,3}>/.test(lines[at])) at += 1;
      const quote = make("blockquote");
      blocks(lines.slice(start, at).map((l) => l.replace(/^ {0,3}> ?/, "")), quote);
      into.append(quote);
    } else if (ITEM.test(line)) at = list(lines, at, into);
    else if (line.includes("|") && TABLE.test(lines[at + 1] || "")) at = table(lines, at, into);
    else {
      const start = at;
      at += 1;
      while (at < lines.length && lines[at].trim() && !startsBlock(lines[at])) at += 1;
      into.append(make("p", inline(lines.slice(start, at).join("\n"))));
    }
  }
}

const startsBlock = (line) =>
  FENCE.test(line) || HEADING.test(line) || RULE.test(line) || /^ {0,3}>/.test(line) || ITEM.test(line) || /^\s*(\$\$|\\\[)/.test(line);

function fence(lines, at, found, into) {
  const [, mark, language] = found;
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

function list(lines, at, into) {
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
    else blocks(inner, item);
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

// Inline marks, tried in this order at every place; what matches none is text.
const MARKS = [
  [/^\\([\\`*_{}[\]()#+\-.!|<>~$])/, (m) => m[1]],
  [/^(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)/, (m) => make("code", m[2].trim() || m[2])],
  [/^\\\(([\s\S]+?)\\\)/, (m) => math(m[1], false)],
  [/^\$\$([\s\S]+?)\$\$/, (m) => math(m[1], true)],
  [/^\$(?=[^\s$])([^$\n]*?[^\s$\\])\$(?!\d)/, (m) => math(m[1], false)],
  [/^\*\*\*(?=\S)([\s\S]+?\S)\*\*\*/, (m) => make("strong", make("em", inline(m[1])))],
  [/^(\*\*|__)(?=\S)([\s\S]*?\S)\1/, (m) => make("strong", inline(m[2]))],
  [/^\*(?=[^\s*])([\s\S]*?[^\s*])\*(?!\*)/, (m) => make("em", inline(m[1]))],
  [/^~~(?=\S)([\s\S]*?\S)~~/, (m) => make("del", inline(m[1]))],
  [/^!\[([^\]]*)\]\(([^\s)]+)[^)]*\)/, (m) => link(m[2], [m[1] || "image"])],
  [/^\[([^\]]+)\]\(([^\s)]+)(?:\s+"[^"]*")?\)/, (m) => link(m[2], inline(m[1]))],
  [/^<(https?:\/\/[^\s<>]+)>/, (m) => link(m[1], [m[1]])],
  [/^https?:\/\/[^\s<>()]*[^\s<>().,;:!?'"\]]/, (m) => link(m[0], [m[0]])],
  [/^ {2,}\n|^\\\n/, () => make("br")],
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
  let plain = "";
  let at = 0;
  while (at < text.length) {
    const rest = text.slice(at);
    const under = rest[0] === "_" && !/\w$/.test(plain) && rest.match(/^_(?=[^\s_])([\s\S]*?[^\s_])_(?!\w)/);
    let node = under ? make("em", inline(under[1])) : null;
    let size = under ? under[0].length : 0;
    if (!node && "\\`$*_~![<h \n".includes(rest[0])) {
      for (const [pattern, build] of MARKS) {
        const found = rest.match(pattern);
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
