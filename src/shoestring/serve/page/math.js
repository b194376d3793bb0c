// A part of TeX to MathML, which browsers draw themselves: fractions, roots, scripts, Greek, relations, matrices, text.
// What is not known, or nested more than DEEPEST deep, is shown as it was written.
const NS = "http://www.w3.org/1998/Math/MathML";
const el = (tag, children = [], attributes = {}) => {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...[].concat(children));
  return node;
};

const DEEPEST = 40;

const GREEK = "alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ vartheta ϑ iota ι kappa κ lambda λ mu μ nu ν xi ξ pi π rho ρ sigma σ tau τ upsilon υ phi ϕ varphi φ chi χ psi ψ omega ω Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Phi Φ Psi Ψ Omega Ω ell ℓ infty ∞ partial ∂ nabla ∇ hbar ℏ emptyset ∅ varnothing ∅ Re ℜ Im ℑ aleph ℵ";
const OPERATORS = "cdot ⋅ times × div ÷ pm ± mp ∓ le ≤ leq ≤ ge ≥ geq ≥ ne ≠ neq ≠ approx ≈ equiv ≡ sim ∼ simeq ≃ cong ≅ propto ∝ ll ≪ gg ≫ to → rightarrow → leftarrow ← Rightarrow ⇒ Leftarrow ⇐ implies ⟹ iff ⟺ leftrightarrow ↔ Leftrightarrow ⇔ mapsto ↦ in ∈ notin ∉ ni ∋ subset ⊂ subseteq ⊆ supset ⊃ supseteq ⊇ cup ∪ cap ∩ setminus ∖ wedge ∧ land ∧ vee ∨ lor ∨ neg ¬ lnot ¬ forall ∀ exists ∃ mid ∣ nmid ∤ parallel ∥ perp ⟂ angle ∠ circ ∘ bullet ∙ star ⋆ ast ∗ oplus ⊕ otimes ⊗ ldots … dots … cdots ⋯ vdots ⋮ ddots ⋱ prime ′ lfloor ⌊ rfloor ⌋ lceil ⌈ rceil ⌉ langle ⟨ rangle ⟩ lvert | rvert | vert | Vert ‖ colon : therefore ∴ because ∵ square □ blacksquare ■ triangle △ checkmark ✓ degree °";
const LARGE = "sum ∑ prod ∏ int ∫ iint ∬ oint ∮ bigcup ⋃ bigcap ⋂ bigoplus ⨁";
const NAMED = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp lim max min sup inf gcd lcm det dim ker deg arg Pr mod limsup liminf";
const pairs = (text) => Object.fromEntries(text.split(" ").reduce((all, word, i, words) => (i % 2 ? all : [...all, [word, words[i + 1]]]), []));
const [greek, operators, large] = [pairs(GREEK), pairs(OPERATORS), pairs(LARGE)];
const named = new Set(NAMED.split(" "));
const SPACES = { ",": "0.17em", ":": "0.22em", ";": "0.28em", " ": "0.3em", quad: "1em", qquad: "2em", "!": "-0.17em" };
const ACCENTS = { hat: "^", widehat: "^", bar: "¯", overline: "¯", vec: "→", tilde: "~", widetilde: "~", dot: "˙", ddot: "¨" };
const FONTS = { mathbf: "bold", boldsymbol: "bold", bm: "bold", mathrm: "normal", mathit: "italic", mathsf: "sans-serif", mathcal: "script", mathbb: "double-struck" };

export function math(source, display) {
  const parser = new Parser(source.trim());
  try {
    const body = parser.row();
    if (!parser.end) throw new Error("unread");
    const node = el("math", el("mrow", body), display ? { display: "block" } : {});
    node.setAttribute("aria-label", source.trim());
    return node;
  } catch {
    const code = document.createElement("code");
    code.textContent = source;
    return code;
  }
}

class Parser {
  constructor(text) {
    this.tokens = text.match(/\\[a-zA-Z]+\*?|\\[\s\S]|[{}^_&]|\d+(?:[.,]\d+)*|\s+|[\s\S]/gu)?.filter((t) => t.trim() || t === "\\ ") || [];
    this.at = 0;
    this.depth = 0;
  }
  get end() {
    return this.at >= this.tokens.length;
  }
  peek() {
    return this.tokens[this.at];
  }
  next() {
    if (this.end) throw new Error("unfinished");
    return this.tokens[this.at++];
  }
  row(...until) {
    const nodes = [];
    while (!this.end && !until.includes(this.peek()) && this.peek() !== "}") nodes.push(this.scripted());
    return nodes;
  }
  scripted() {
    if (++this.depth > DEEPEST) throw new Error("deep");
    const node = this.withScripts();
    this.depth -= 1;
    return node;
  }
  withScripts() {
    let over = false;
    let base;
    if (this.peek() === "^" || this.peek() === "_") base = el("mrow");
    else {
      over = large[this.peek().slice(1)] || ["\\lim", "\\max", "\\min", "\\sup", "\\inf"].includes(this.peek());
      base = this.atom();
    }
    let sub, sup;
    for (;;) {
      if (this.peek() === "\\limits" || this.peek() === "\\nolimits") this.next();
      else if (this.peek() === "_" && !sub) sub = (this.next(), this.argument());
      else if (this.peek() === "^" && !sup) sup = (this.next(), this.argument());
      else if (this.peek() === "'") sup = el("mrow", [...(sup ? [sup] : []), (this.next(), el("mo", "′"))]);
      else break;
    }
    const [both, low, high] = over ? ["munderover", "munder", "mover"] : ["msubsup", "msub", "msup"];
    if (sub && sup) return el(both, [base, sub, sup]);
    return sub ? el(low, [base, sub]) : sup ? el(high, [base, sup]) : base;
  }
  argument() {
    if (this.peek() !== "{") return this.atom();
    return this.group();
  }
  group() {
    this.next();
    const row = el("mrow", this.row());
    if (this.next() !== "}") throw new Error("brace");
    return row;
  }
  words() {
    if (this.next() !== "{") throw new Error("brace");
    let depth = 1;
    let text = "";
    while (depth) {
      const token = this.next();
      depth += token === "{" ? 1 : token === "}" ? -1 : 0;
      if (depth) text += token === "\\ " ? " " : token;
    }
    return text;
  }
  atom() {
    const token = this.next();
    if (token === "{") return (this.at--, this.group());
    if (token === "}" || token === "&") throw new Error("brace");
    if (/^\d/.test(token)) return el("mn", token);
    if (/^[\p{L}]$/u.test(token)) return el("mi", token);
    if (token[0] !== "\\") return el("mo", token === "-" ? "−" : token === "*" ? "∗" : token);
    return this.command(token.slice(1).replace(/\*$/, ""));
  }
  command(name) {
    if (greek[name]) return el("mi", greek[name]);
    if (operators[name]) return el("mo", operators[name]);
    if (large[name]) return el("mo", large[name], { largeop: "true" });
    if (named.has(name)) return el("mi", name, { mathvariant: "normal" });
    if (name in SPACES) return el("mspace", [], { width: SPACES[name] });
    if (/^[dt]?frac$/.test(name)) return el("mfrac", [this.argument(), this.argument()]);
    if (name === "bmod") return el("mo", "mod", { lspace: "0.3em", rspace: "0.3em" });
    if (name === "pmod") return el("mrow", [el("mspace", [], { width: "0.6em" }), el("mo", "("), el("mi", "mod"), el("mspace", [], { width: "0.3em" }), this.argument(), el("mo", ")")]);
    if (name === "binom") return el("mrow", [el("mo", "("), el("mfrac", [this.argument(), this.argument()], { linethickness: "0" }), el("mo", ")")]);
    if (name === "sqrt") return this.root();
    if (name in ACCENTS) return el("mover", [this.argument(), el("mo", ACCENTS[name])], { accent: "true" });
    if (name === "underline") return el("munder", [this.argument(), el("mo", "_")]);
    if (name === "boxed" || name === "fbox") return el("mrow", this.argument(), { class: "boxed" });
    if (["text", "textrm", "textbf", "textit", "mbox", "operatorname"].includes(name)) return el("mtext", this.words());
    if (name in FONTS) return el("mstyle", this.argument(), { mathvariant: FONTS[name], class: `m-${FONTS[name]}` });
    if (name === "left" || /^[bB]ig+[lr]?$/.test(name)) return this.fence(name);
    if (name === "begin") return this.environment();
    if ("{}$%#&_|".includes(name)) return el("mo", name === "|" ? "‖" : name);
    if (["displaystyle", "textstyle", "limits", "nolimits"].includes(name)) return el("mrow");
    return el("mtext", `\\${name}`);
  }
  root() {
    if (this.peek() !== "[") return el("msqrt", this.argument());
    this.next();
    const index = el("mrow", this.row("]"));
    this.next();
    return el("mroot", [this.argument(), index]);
  }
  delimiter() {
    const token = this.next();
    return token === "." ? "" : token[0] === "\\" ? operators[token.slice(1)] || token.slice(1) : token;
  }
  fence(name) {
    const open = this.delimiter();
    if (name !== "left") return el("mo", open, { stretchy: "false" });
    const body = this.row("\\right");
    this.next();
    return el("mrow", [el("mo", open), ...body, el("mo", this.delimiter())]);
  }
  environment() {
    const name = this.words().replace("*", "");
    const fences = { pmatrix: "()", bmatrix: "[]", vmatrix: "||", cases: "{ " }[name] || "  ";
    if (name === "array" && this.peek() === "{") this.words();
    const rows = [[]];
    while (this.peek() !== "\\end") {
      rows.at(-1).push(el("mtd", this.row("&", "\\\\", "\\end")));
      if (this.peek() === "&") this.next();
      else if (this.peek() === "\\\\") (this.next(), rows.push([]));
      else if (this.peek() !== "\\end") throw new Error("environment");
    }
    this.next();
    this.words();
    const table = el("mtable", rows.filter((row) => row.length).map((row) => el("mtr", row)), name.startsWith("align") || name === "cases" ? { class: "left" } : {});
    return el("mrow", [el("mo", fences[0].trim()), table, el("mo", fences[1].trim())]);
  }
}
