"use strict";

// What is shown, worked out from the data alone.

const PALETTE = ["#56b4e9", "#e69f00", "#5cc29b", "#cc79a7", "#f0e442", "#8c9fe0", "#d98560", "#a8b0ba"];

/** The keys that token `query` sees in a layer under a query head, by kind; `modeling_deepseek_r1/attention/pattern.py`. */
function attentionSet(layer, head, query) {
  const sets = { sink: [], window: [], routed: [], node: [] };
  const first = layer.window === null ? 0 : query - layer.window + 1;
  for (let key = 0; key <= query; key++) {
    if (key >= first) sets.window.push(key);
    else if (key < layer.sinks) sets.sink.push(key);
    else if (layer.stride && (key + 1) % layer.stride === 0) sets.node.push(key);
  }
  if (!layer.query_clusters.length) return sets;
  const keys = layer.key_clusters[Math.floor(head / (layer.heads / layer.groups))];
  const left = new Map(layer.query_clusters[head][query].map((cluster) => [cluster, layer.routed_tokens]));
  for (let key = first - 1; key >= layer.sinks; key--) {
    if (left.get(keys[key]) > 0) {
      left.set(keys[key], left.get(keys[key]) - 1);
      sets.routed.push(key);
    }
  }
  sets.routed.reverse();
  return sets;
}

function domainOf(layer, expert) {
  let last = -1;
  for (const [domain, count] of layer.domains) if (expert <= (last += count)) return domain;
}

/** The domain whose experts have the largest weights of a token, added up over the layers. */
function domainOfToken(layers, token) {
  const sums = new Map();
  for (const layer of layers) {
    layer.index[token].forEach((expert, slot) => {
      const domain = domainOf(layer, expert);
      sums.set(domain, (sums.get(domain) || 0) + layer.weights[token][slot]);
    });
  }
  let best = null;
  for (const [domain, sum] of sums) if (best === null || sum > sums.get(best)) best = domain;
  return best;
}

function activeExperts(layers, token) {
  return layers.reduce((sum, layer) => sum + layer.index[token].length, 0) / layers.length;
}

function domainNames(layers) {
  return [...new Set(layers.flatMap((layer) => layer.domains.map(([domain]) => domain)))];
}

/** A colour between white and a dark blue; 0 ... 1. */
function shade(share, end = [23, 78, 140]) {
  const part = Math.max(0, Math.min(1, share));
  return `rgb(${end.map((value) => Math.round(255 + (value - 255) * part)).join(", ")})`;
}

/** For a way to colour tokens: a colour per token, and (colour, words) for the legend. */
function colouring(data, kind, layers) {
  if (kind === "domain") {
    const names = domainNames(data.experts);
    const colour = (domain) => PALETTE[names.indexOf(domain) % PALETTE.length];
    const own = domainNames(layers);
    return { colours: data.ids.map((_, token) => colour(domainOfToken(layers, token))), legend: own.map((name) => [colour(name), name]) };
  }
  const losses = kind === "loss";
  const values = data.ids.map((_, token) => (losses ? data.losses[token] : activeExperts(layers, token)));
  const known = values.filter((value) => value !== null);
  const [low, high] = losses ? [0, 12] : [Math.min(...known), Math.max(...known)];
  const end = losses ? [214, 69, 65] : [46, 125, 120];
  const place = (value) => (high > low ? 0.1 + (0.75 * (value - low)) / (high - low) : 0.4);
  const steps = high > low ? [low, (low + high) / 2, high] : [low];
  const unit = losses ? " nats" : " experts";
  return {
    colours: values.map((value) => (value === null ? "transparent" : shade(place(value), end))),
    legend: steps.map((value) => [shade(place(value), end), `${+value.toFixed(2)}${unit}`]),
  };
}

// The page.

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "style" || name === "data") Object.assign(name === "style" ? made.style : made.dataset, value);
    else made[name] = value;
  }
  made.append(...children.map((child) => (typeof child === "number" ? String(child) : child)));
  return made;
}

function table(header, rows) {
  const cell = (tag) => (value) => {
    const [text, className] = Array.isArray(value) ? value : [value, ""];
    return element(tag, { className }, text);
  };
  return element("table", {}, element("tr", {}, ...header.map(cell("th"))), ...rows.map((row) => element("tr", {}, ...row.map(cell("td")))));
}

function fillLegend(target, entries) {
  target.replaceChildren(...entries.map(([colour, words]) => element("span", {}, element("i", { style: { background: colour } }), words)));
}

function describe(text) {
  return text === "" ? "part of a character" : JSON.stringify(text);
}

class Page {
  constructor(data) {
    this.data = data;
    this.chosen = null;
    const get = (id) => document.getElementById(id);
    this.at = Object.fromEntries(["colour", "stage", "legend", "tokens", "chosen", "layer", "head", "sets", "layers", "choice"].map((id) => [id, get(id)]));
    get("about").textContent = `${data.ids.length.toLocaleString("en")} of ${data.text_tokens.toLocaleString("en")} tokens of the text; ${data.attention.length} layers, ${data.experts.length} of them with experts.`;
    this.fillControls();
    this.fillTokens();
    get("heat").replaceChildren(this.heatMap());
    get("costs").replaceChildren(table(["", "", ""], data.costs.map(([what, figure, words]) => [what, [figure, "number"], [words, "wide"]])));
    const total = data.sizes.reduce((sum, row) => sum + row[1], 0);
    get("sizes").replaceChildren(table(["part", ["parameters", "number"], ["MB", "number"], ["share", "number"]], [...data.sizes, ["all", total, data.sizes.reduce((sum, row) => sum + row[2], 0)]].map(([part, count, bytes]) => [part, [count.toLocaleString("en"), "number"], [(bytes / 1e6).toFixed(2), "number"], [`${((100 * count) / total).toFixed(1)} %`, "number"]])));
    this.colour();
    window.addEventListener("hashchange", () => this.follow());
    this.follow();
  }

  fillControls() {
    const { experts, attention } = this.data;
    const option = (value, words) => element("option", { value }, words);
    const kinds = [["loss", "loss of the token"]];
    if (experts.length) kinds.unshift(["domain", "domain of its experts"], ["active", "experts per token"]);
    this.at.colour.replaceChildren(...kinds.map(([value, words]) => option(value, words)));
    this.at.stage.replaceChildren(option("all", "all layers"), ...experts.map((layer) => option(layer.layer, `layer ${layer.layer}`)));
    this.at.stage.parentElement.hidden = !experts.length;
    this.at.layer.replaceChildren(...attention.map((layer) => option(layer.layer, `${layer.layer}: ${layer.kind.replace("_attention", "").replace("_", " + ")}`)));
    this.fillHeads();
    this.at.colour.onchange = this.at.stage.onchange = () => this.colour();
    this.at.layer.onchange = () => { this.fillHeads(); this.show(); };
    this.at.head.onchange = () => this.show();
  }

  fillHeads() {
    const layer = this.data.attention[this.at.layer.value];
    const before = Number(this.at.head.value) || 0;
    // Without clusters every head sees the same keys.
    const heads = layer.query_clusters.length ? layer.heads : 1;
    this.at.head.replaceChildren(...Array.from({ length: heads }, (_, head) => element("option", { value: head }, heads > 1 ? head : "all alike")));
    this.at.head.value = before < heads ? before : 0;
  }

  fillTokens() {
    this.spans = this.data.pieces.map((piece, token) => {
      const span = element("span", { data: { token } });
      if (/^[\n\r]+$/.test(piece) || piece === "") span.append(element("span", { className: "mark" }, piece === "" ? "·" : "↵"), piece);
      else span.append(piece);
      return span;
    });
    this.at.tokens.replaceChildren(...this.spans);
    this.at.tokens.onclick = (event) => {
      const span = event.target.closest("[data-token]");
      if (span) this.choose(Number(span.dataset.token));
    };
    this.at.tokens.onkeydown = (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || this.chosen === null) return;
      event.preventDefault();
      this.choose(Math.max(0, Math.min(this.spans.length - 1, this.chosen + step)));
    };
  }

  colour() {
    const { experts } = this.data;
    const layers = this.at.stage.value === "all" ? experts : experts.filter((layer) => layer.layer === Number(this.at.stage.value));
    this.at.stage.disabled = this.at.colour.value === "loss";
    const { colours, legend } = colouring(this.data, this.at.colour.value, layers);
    this.spans.forEach((span, token) => { span.style.background = colours[token]; });
    fillLegend(this.at.legend, legend);
  }

  /** `#token=40&layer=2&head=1&colour=active` leads to a place on the page. */
  follow() {
    const place = new URLSearchParams(location.hash.slice(1));
    if (place.has("colour")) { this.at.colour.value = place.get("colour"); this.colour(); }
    if (this.data.attention[place.get("layer")]) { this.at.layer.value = place.get("layer"); this.fillHeads(); }
    if (place.has("head")) this.at.head.value = place.get("head");
    const token = place.get("token");
    if (token !== null && this.data.ids[token] !== undefined) this.choose(Number(token));
  }

  choose(token) {
    this.chosen = token;
    this.show();
    this.spans[token].scrollIntoView({ block: "nearest" });
  }

  show() {
    const { data, chosen, at } = this;
    if (chosen === null) return;
    const layer = data.attention[at.layer.value];
    const sets = attentionSet(layer, Number(at.head.value), chosen);
    const kind = new Map(Object.entries(sets).flatMap(([name, keys]) => keys.map((key) => [key, name])));
    at.tokens.className = "picked";
    this.spans.forEach((span, token) => {
      span.className = token === chosen ? "self" : token > chosen ? "later" : kind.get(token) || "unseen";
    });
    const loss = data.losses[chosen];
    at.chosen.textContent = `Number ${chosen}, ${describe(data.pieces[chosen])}, id ${data.ids[chosen]}` + (loss === null ? "" : `, loss ${loss.toFixed(2)} nats (probability ${(100 * Math.exp(-loss)).toPrecision(2)} %)`);
    const count = (name) => sets[name].length;
    fillLegend(at.sets, [["#2a6fb0", `${layer.window === null ? "all earlier" : "window"}: ${count("window")}`], ...(layer.sinks ? [["#a0522d", `sinks: ${count("sink")}`]] : []), ...(layer.query_clusters.length ? [["#c2185b", `routed: ${count("routed")}`]] : []), ...(layer.stride ? [["#2e7d32", `nodes: ${count("node")}`]] : []), ...(layer.memory ? [["#777", `memory tokens: ${layer.memory}`]] : [])]);
    this.showLayers();
    this.showExperts();
  }

  /** Columns that no layer has anything in are left out. */
  showLayers() {
    const { data, chosen, at } = this;
    const columns = [["window", () => true], ["sink", (layer) => layer.sinks], ["routed", (layer) => layer.query_clusters.length], ["node", (layer) => layer.stride]]
      .filter(([, has]) => data.attention.some(has));
    const memory = data.attention.some((layer) => layer.memory);
    const rows = data.attention.map((layer) => {
      const heads = layer.query_clusters.length ? layer.heads : 1;
      const all = Array.from({ length: heads }, (_, head) => attentionSet(layer, head, chosen));
      const means = columns.map(([name]) => +(all.reduce((sum, sets) => sum + sets[name].length, 0) / heads).toFixed(1) || "");
      return [layer.layer, ...means, ...(memory ? [layer.memory || ""] : [])].map((value) => [String(value), "number"]);
    });
    const titles = { window: "window", sink: "sinks", routed: "routed", node: "nodes" };
    const header = ["layer", ...columns.map(([name]) => titles[name]), ...(memory ? ["memory"] : [])];
    const made = table(header.map((name) => [name, "number"]), rows);
    [...made.rows].slice(1).forEach((row, layer) => {
      row.dataset.layer = layer;
      row.className = layer === Number(at.layer.value) ? "chosen" : "";
      row.onclick = () => { at.layer.value = layer; this.fillHeads(); this.show(); };
    });
    const far = columns.some(([name]) => name === "routed" || name === "node");
    at.layers.replaceChildren(made, far ? "" : "No layer has routed keys or nodes.");
  }

  showExperts() {
    const { data, chosen, at } = this;
    if (!data.experts.length) return at.choice.replaceChildren("The model has no experts.");
    const rows = data.experts.map((layer) => [[String(layer.layer), "number"], [String(layer.index[chosen].length), "number"], layer.index[chosen].map((expert, slot) => `${domainOf(layer, expert)} ${expert} (${(100 * layer.weights[chosen][slot]).toFixed(0)} %)`).join(", ") + (layer.shared ? ", and the shared one" : "")]);
    at.choice.replaceChildren(table([["layer", "number"], ["active", "number"], "expert (weight)"], rows));
  }

  heatMap() {
    const { experts } = this.data;
    if (!experts.length) return element("p", {}, "The model has no experts.");
    const names = domainNames(experts);
    const made = element("table");
    const largest = Math.max(...experts.flatMap((layer) => layer.shares));
    let before = "";
    for (const layer of experts) {
      const header = JSON.stringify(layer.domains);
      if (header !== before) {
        const cells = layer.domains.map(([domain, count]) => element("th", { colSpan: count, className: "domain", style: { borderColor: PALETTE[names.indexOf(domain) % PALETTE.length] } }, domain));
        made.append(element("tr", {}, element("th", {}, "layer"), ...cells, element("th", { className: "number" }, "active")));
      }
      before = header;
      const cells = layer.shares.map((share, expert) => element("td", { className: "cell", title: `expert ${expert} (${domainOf(layer, expert)}): ${(100 * share).toFixed(1)} % of the work`, style: { background: shade(share / largest), color: share > 0.55 * largest ? "#fff" : "#333" } }, (100 * share).toFixed(0)));
      made.append(element("tr", {}, element("th", {}, layer.layer), ...cells, element("td", { className: "number" }, layer.mean_active.toFixed(2))));
    }
    return element("div", {}, element("p", { className: "hint" }, "Share of the layer's work, %, that each expert did on this text."), made);
  }
}

if (typeof document !== "undefined") new Page(JSON.parse(document.getElementById("data").textContent));
