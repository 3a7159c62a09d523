"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const PAGE = 25;
const state = { find: "", sort: "index", down: false, dead: false, explained: false, start: 0 };

// -- where features come from: this page, or its server --------------------------------------
const word = (token) => (typeof token === "number" ? data.tokens[token] : token);
const gone = (row) => row.top === 0;
const within = {
  index: (row) => row.i,
  density: (row) => row.density ?? -1,
  top: (row) => Math.abs(row.top),
};

function here(features) {
  const byIndex = new Map(features.map((feature) => [feature.i, feature]));
  const texts = new Map(features.map((f) =>
    [f.i, ["#" + f.i, ...f.fires, ...f.says, f.words].join(" ").toLowerCase()]));
  return {
    explained: features.some((feature) => feature.words),
    has: (index) => byIndex.has(index),
    feature: async (index) => byIndex.get(index),
    rows: async (asked) => {
      const words = asked.find.toLowerCase().split(/\s+/).filter(Boolean);
      const key = within[asked.sort], sign = asked.down ? -1 : 1;
      const found = features.filter((f) =>
        (asked.dead || !gone(f)) && (!asked.explained || f.words) &&
        words.every((one) => texts.get(f.i).includes(one)));
      found.sort((a, b) => sign * (key(a) - key(b)) || a.i - b.i);
      return { total: found.length, rows: found.slice(asked.start, asked.start + PAGE) };
    },
  };
}

function there() {
  const get = async (path) => {
    const answer = await fetch(path);
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  };
  return {
    explained: true,
    has: () => true,
    feature: (index) => get("/feature/" + index),
    rows: (asked) => get("/rows?" + new URLSearchParams({
      find: asked.find, sort: asked.sort, down: asked.down ? 1 : 0, dead: asked.dead ? 1 : 0,
      explained: asked.explained ? 1 : 0, start: asked.start, count: PAGE,
    })),
  };
}

const source = data.features ? here(data.features) : there();

// -- small parts -----------------------------------------------------------------------------
function make(name, attributes = {}, ...inside) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...inside);
  return made;
}

const figure = (value) => {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const text = size === 0 ? "0" : size < 0.001 || size >= 1e5 ? value.toExponential(1)
    : size >= 100 ? value.toFixed(0) : value.toPrecision(3);
  return text.replaceAll("-", "−");
};
const percent = (share) => {
  if (share === null || share === undefined) return "–";
  if (share === 0) return "0\u202f%";
  const text = share < 0.0001 ? (100 * share).toExponential(1).replace("-", "−")
    : share >= 0.1 ? (100 * share).toFixed(0) : (100 * share).toPrecision(2);
  return text + "\u202f%";
};

// Spaces and line breaks that a reader must see are drawn, the rest is the text itself.
function drawn(text, edges) {
  const parts = [];
  const sign = (mark) => parts.push(make("i", {}, mark));
  const pieces = text.match(/\n+|\t+|\r+| +|[^\n\t\r ]+/g) ?? [];
  pieces.forEach((piece, place) => {
    const many = piece.length > 3 ? "×" + piece.length : "";
    if (piece[0] === "\n") sign(many ? "↵" + many : "↵".repeat(piece.length));
    else if (piece[0] === "\t") sign(many ? "⇥" + many : "⇥".repeat(piece.length));
    else if (piece[0] === "\r") sign("␍");
    else if (piece[0] === " " && (piece.length > 1 || pieces.length === 1 || edges)
             && (place === 0 || place === pieces.length - 1 || piece.length > 1)) {
      sign(many ? "·" + many : "·".repeat(piece.length));
    } else parts.push(piece);
  });
  return parts.length ? parts : [make("i", {}, "∅")];
}

const chip = (token) => make("span", { class: "word" }, ...drawn(word(token), true));

// -- the table -------------------------------------------------------------------------------
const body = document.querySelector("#browse tbody");
const promotes = $("says") !== null;
let asked = 0;

async function list() {
  const turn = ++asked;
  let found;
  try {
    found = await source.rows(state);
  } catch (error) {
    $("where").textContent = "no answer: is gossamer still running?";
    return;
  }
  if (turn !== asked) return;
  body.replaceChildren(...found.rows.flatMap(line));
  if (!found.rows.length) {
    const cell = make("td", { colspan: promotes ? 5 : 4, class: "muted" }, "Nothing matches.");
    body.append(make("tr", {}, cell));
  }
  const last = Math.min(found.total, state.start + PAGE);
  const count = (value) => value.toLocaleString("en");
  $("where").textContent = found.total
    ? `${count(state.start + 1)} to ${count(last)} of ${count(found.total)}` : "0 features";
  $("back").disabled = state.start === 0;
  $("on").disabled = last >= found.total;
  mark();
  return found.rows;
}

function line(row) {
  const link = make("a", { href: "#" + row.i }, "#" + row.i);
  const made = make("tr", { "data-index": row.i, class: gone(row) ? "gone" : "" },
    make("th", { scope: "row" }, link), make("td", {}, ...row.fires.slice(0, 3).map(chip)),
    make("td", { class: "n" }, percent(row.density)), make("td", { class: "n" }, figure(row.top)));
  if (promotes) made.append(make("td", { class: "roomy" }, ...row.says.slice(0, 3).map(chip)));
  const lines = [made];
  if (row.words) {
    const words = make("td", { colspan: 3, title: row.words }, row.words);
    lines.push(make("tr", { "data-index": row.i, class: "told" }, make("td"), words));
    if (promotes) lines[1].append(make("td", { class: "roomy" }));
  }
  for (const one of lines) one.addEventListener("click", () => { location.hash = row.i; });
  return lines;
}

function mark() {
  const chosen = location.hash.slice(1);
  for (const row of body.rows) {
    row.toggleAttribute("aria-current", chosen !== "" && row.dataset.index === chosen);
  }
}

for (const head of document.querySelectorAll("#browse th[data-sort]")) {
  const button = make("button", { type: "button" });
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const key = head.dataset.sort;
    // Figures are wanted largest first, numbers of features smallest first.
    state.down = state.sort === key ? !state.down : key !== "index";
    state.sort = key;
    state.start = 0;
    heads();
    list();
  });
}

function heads() {
  for (const head of document.querySelectorAll("#browse th[data-sort]")) {
    head.removeAttribute("aria-sort");
    if (head.dataset.sort === state.sort) {
      head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    }
  }
}

let waiting = 0;
document.querySelector(".filter").addEventListener("submit", (event) => event.preventDefault());
$("find").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => { state.find = $("find").value; state.start = 0; list(); }, 120);
});
for (const name of ["dead", "explained"]) {
  $(name).addEventListener("change", () => { state[name] = $(name).checked; state.start = 0; list(); });
}
$("back").addEventListener("click", () => { state.start -= PAGE; list(); });
$("on").addEventListener("click", () => { state.start += PAGE; list(); });

// -- one feature -----------------------------------------------------------------------------
function chart(bars) {
  const svg = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const [width, height] = [560, 92];
  const most = Math.max(...bars.counts), step = width / bars.counts.length;
  const size = (bars.high - bars.low) / bars.counts.length;
  const made = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img",
    "aria-label": `Histogram from ${figure(bars.low)} to ${figure(bars.high)}`,
  });
  bars.counts.forEach((count, place) => {
    if (!count) return;
    const from = bars.low + place * size, tall = Math.max(1.5, (count / most) * height);
    const rect = svg("rect", {
      x: place * step + 0.5, y: height - tall, width: Math.max(1, step - 1), height: tall,
      class: from + size / 2 < 0 ? "minus" : "",
    });
    rect.dataset.tip = `${count.toLocaleString("en")} codes from ${figure(from)} to ${figure(from + size)}`;
    made.append(rect);
  });
  const ends = make("p", { class: "ends" }, make("span", {}, figure(bars.low)),
    make("span", {}, figure(bars.high)));
  return make("div", { class: "bars" }, made, ends);
}

function logits(pairs, kind) {
  const most = Math.max(...pairs.map(([, value]) => Math.abs(value)), 1e-30);
  return make("ul", { class: "logits " + kind }, ...pairs.map(([token, value]) => {
    const bar = make("span", { class: "bar" });
    bar.style.width = Math.max(2, (100 * Math.abs(value)) / most) + "%";
    return make("li", {}, chip(token), bar, make("span", { class: "n" }, figure(value)));
  }));
}

function example(one, largest) {
  const values = new Map(one.v);
  const text = make("p", {}, ...one.t.map((token, place) => {
    const value = values.get(place) ?? 0;
    const kinds = ["tok", value > 0 ? "hot" : value < 0 ? "cold" : "", place === one.at ? "here" : ""];
    const made = make("span", { class: kinds.filter(Boolean).join(" ") }, ...drawn(word(token), false));
    if (value) made.style.setProperty("--heat", Math.min(1, Math.abs(value) / largest).toFixed(3));
    made.dataset.tip = `${JSON.stringify(word(token))} ${figure(value)}`;
    return made;
  }));
  const value = values.get(one.at) ?? 0;
  return make("div", { class: "example" }, make("span", { class: "n" }, figure(value)), text);
}

const NAMES = { top: "Top activations", bottom: "Most negative activations" };

function shown(feature) {
  const largest = Math.max(Math.abs(feature.top), Math.abs(feature.low), 1e-30);
  const title = (text, note) => make("h3", {}, text, ...(note ? [make("small", {}, note)] : []));
  const parts = [make("h2", {}, "Feature " + feature.i)];
  if (feature.words) parts.push(make("p", { class: "meaning" }, feature.words));
  if (gone(feature)) {
    parts.push(make("p", { class: "brief" }, "No token of this text fired it."));
  } else {
    const brief = [
      feature.density === null ? "" : `fires on ${percent(feature.density)} of tokens`,
      `largest ${figure(feature.top)}`,
      feature.mean === null ? "" : `mean ${figure(feature.mean)} when it fires`,
    ];
    parts.push(make("p", { class: "brief" }, brief.filter(Boolean).join(" · ")));
  }
  if (feature.bars.counts.length) parts.push(title("Activations", "where it fires"), chart(feature.bars));
  if (feature.up.length) {
    parts.push(make("div", { class: "pair" },
      make("div", {}, title("Positive logits"), logits(feature.up, "rise")),
      make("div", {}, title("Negative logits"), logits(feature.down, "fall"))));
  }
  if (feature.near.length) {
    parts.push(title("Neighbours", "cosine of atoms"), make("div", { class: "near" },
      ...feature.near.map(([index, cosine]) => {
        const inside = ["#" + index, make("small", {}, cosine.toFixed(2).replace("-", "−"))];
        return source.has(index) ? make("a", { href: "#" + index }, ...inside) : make("span", {}, ...inside);
      })));
  }
  for (const group of feature.groups) {
    const span = `${figure(group.low)} to ${figure(group.high)}`;
    const note = group.kind === "interval" ? `${percent(group.share)} of activations` : "";
    parts.push(title(NAMES[group.kind] ?? span, note), ...group.examples.map((one) => example(one, largest)));
  }
  return parts;
}

async function show(jump) {
  const index = Number(location.hash.slice(1));
  mark();
  if (!/^#\d+$/.test(location.hash)) return;
  let feature;
  try {
    feature = await source.feature(index);
  } catch (error) {
    feature = undefined;
  }
  if (Number(location.hash.slice(1)) !== index) return;
  $("tip").hidden = true;
  $("detail").scrollTop = 0;
  $("detail").replaceChildren(...(feature ? shown(feature)
    : [make("p", { class: "brief" }, `Feature ${index} is not on this page.`)]));
  if (jump && matchMedia("(max-width: 980px)").matches) $("detail").scrollIntoView();
}
addEventListener("hashchange", () => show(true));

// -- what a token did, where the pointer is --------------------------------------------------
$("detail").addEventListener("pointerover", (event) => {
  const at = event.target.closest("[data-tip]"), tip = $("tip");
  tip.hidden = at === null;
  if (at === null) return;
  tip.textContent = at.dataset.tip;
  const box = at.getBoundingClientRect(), own = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(box.left, innerWidth - own.width - 8)) + "px";
  tip.style.top = (box.top > own.height + 8 ? box.top - own.height - 6 : box.bottom + 6) + "px";
});
$("detail").addEventListener("pointerleave", () => { $("tip").hidden = true; });

$("told").hidden = !source.explained;
heads();
list().then((rows) => {
  if (location.hash) show(false);
  else if (rows?.length) history.replaceState(null, "", "#" + rows[0].i), show(false);
});
