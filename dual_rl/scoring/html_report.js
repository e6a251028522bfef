/* The page of a report: draws the content that html_page.py embedded. No library, nothing loaded but clips. */
"use strict";
const PAGE_SIZE = 25, WIDTH = 380, HEIGHT = 240, LEFT = 54, RIGHT = 10, TOP = 10, BOTTOM = 36;
const SIGNS = {right: "\u2713", wrong: "\u2717", tie: "=", unlabelled: "?", unscored: "\u2013",
  "well-formed": "\u2713", malformed: "\u2717"};
const LABELS = new Map([[1, "A"], [-1, "B"], [0, "tie"], [null, "none"]]);
const find = (id) => document.getElementById(id);
const data = JSON.parse(find("data").textContent);
const isPaired = data.sides.length === 2;
const state = {view: data.main, verdict: "", facets: data.facets.map(() => ""), sort: -1, descending: false,
  text: "", page: 0};
let shown = [];

/* The only ways in which elements are made: text goes in as text. */
function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}
function draw(tag, attributes, ...children) {
  const element = document.createElementNS(find("shapes").namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
function makeTable(table) {
  const cells = (row, tag) => make("tr", {}, ...row.map((cell) => make(tag, {textContent: cell})));
  return make("div", {className: "wide"},
    make("table", {}, table.title ? make("caption", {textContent: table.title}) : null,
      make("thead", {}, cells(table.columns, "th")),
      make("tbody", {}, ...table.rows.map((row) => cells(row, "td")))),
    table.note ? make("p", {className: "note", textContent: table.note}) : null);
}
const short = (value) => String(Number(value.toPrecision(3)));

/* Charts */
function drawAxes(chart, x, y, xTicks, yTicks) {
  const across = (v) => LEFT + (v - x[0]) / (x[1] - x[0]) * (WIDTH - LEFT - RIGHT);
  const up = (v) => HEIGHT - BOTTOM - (v - y[0]) / (y[1] - y[0]) * (HEIGHT - TOP - BOTTOM);
  const svg = draw("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": chart.title},
    draw("path", {class: "axis", d: `M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}`}));
  const ticks = (places, at, anchor) => places.map((place) =>
    draw("text", {...at(place), "text-anchor": anchor}, short(place)));
  svg.append(...ticks(xTicks, (tick) => ({x: across(tick), y: HEIGHT - BOTTOM + 13}), "middle"),
    ...ticks(yTicks, (tick) => ({x: LEFT - 5, y: up(tick) + 3}), "end"));
  svg.append(draw("text", {x: (LEFT + WIDTH) / 2, y: HEIGHT - 5, "text-anchor": "middle"}, chart.x_label));
  svg.append(draw("text", {transform: `translate(11 ${(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)`,
    "text-anchor": "middle"}, chart.y_label || "count"));
  return {svg, across, up};
}
const spread = (low, high, count) => Array.from({length: count + 1}, (_, n) => low + (high - low) * n / count);
function drawBars(chart) {
  const names = Object.keys(chart.series), edges = chart.edges;
  const totals = edges.slice(1).map((_, bar) => names.reduce((sum, name) => sum + chart.series[name][bar], 0));
  const most = Math.max(...totals), every = Math.ceil(edges.length / 7);
  const zero = Math.max(0, edges.findIndex((edge) => Math.abs(edge) < 1e-9 * (edges[1] - edges[0])));
  const {svg, across, up} = drawAxes(chart, [edges[0], edges.at(-1)], [0, most],
    edges.filter((_, n) => (n - zero) % every === 0),
    most < 4 ? spread(0, most, most) : [0, Math.round(most / 2), most]);
  totals.forEach((_, bar) => {
    let base = 0;
    for (const name of names) {
      const count = chart.series[name][bar];
      if (!count) continue;
      svg.append(draw("rect", {class: name, x: across(edges[bar]) + .5, y: up(base + count),
        width: across(edges[bar + 1]) - across(edges[bar]) - 1, height: up(base) - up(base + count)},
        draw("title", {}, `${short(edges[bar])} to ${short(edges[bar + 1])}: ${count} ${name}`)));
      base += count;
    }
  });
  const key = draw("svg", {viewBox: `0 0 ${WIDTH} 14`});
  names.forEach((name, n) => {
    const total = chart.series[name].reduce((sum, count) => sum + count, 0);
    key.append(draw("rect", {class: name, x: LEFT + n * 84, y: 2, width: 10, height: 10}),
      draw("text", {x: LEFT + n * 84 + 14, y: 11}, `${name} ${total}`));
  });
  const rows = totals.map((_, bar) => [`${short(edges[bar])} to ${short(edges[bar + 1])}`,
    ...names.map((name) => String(chart.series[name][bar]))]);
  return [svg, key, {columns: [chart.x_label, ...names], rows}];
}
function drawPoints(chart) {
  const points = chart.points, xs = points.map((p) => p.x), ys = points.map((p) => p.y);
  const pad = (low, high) => low === high ? [low - 1, high + 1] : [low, high];
  const x = chart.is_share ? [0, 1] : pad(Math.min(...xs), Math.max(...xs));
  const y = chart.is_share ? [0, 1] : pad(Math.min(...ys), Math.max(...ys));
  const xTicks = chart.is_share ? spread(0, 1, 5) : xs.filter((_, n) => n % Math.ceil(xs.length / 8) === 0);
  const {svg, across, up} = drawAxes(chart, x, y, xTicks, spread(...y, chart.is_share ? 5 : 4));
  if (chart.is_share) svg.append(draw("path", {class: "guide", d: `M${across(0)} ${up(0)}L${across(1)} ${up(1)}`}));
  svg.append(draw("path", {class: "curve", d: "M" + points.map((p) => `${across(p.x)} ${up(p.y)}`).join("L")}));
  for (const p of points) {
    if (p.low !== null) svg.append(draw("path", {class: "spread", d: `M${across(p.x)} ${up(p.low)}V${up(p.high)}`}));
    svg.append(draw("circle", {class: "dot", cx: across(p.x), cy: up(p.y), r: 3.5},
      draw("title", {}, `${short(p.x)}: ${short(p.y)} of ${p.count}`)));
    const isLast = p === points.at(-1), [shift, anchor] = isLast ? [-5, "end"] : [5, "start"];
    svg.append(draw("text", {x: across(p.x) + shift, y: Math.max(TOP + 6, up(p.y) - 4), "text-anchor": anchor},
      String(p.count)));
  }
  const rows = points.map((p) => [short(p.x), short(p.y), String(p.count)]);
  const note = make("p", {className: "note", textContent: `${chart.note}; numbers at the points are counts`});
  return [svg, note, {columns: [chart.x_label, chart.y_label, "count"], rows}];
}
function makeChart(chart) {
  const parts = chart.kind === "bars" ? drawBars(chart) : drawPoints(chart), table = parts.pop();
  return make("figure", {}, make("figcaption", {textContent: chart.title}), ...parts,
    make("details", {}, make("summary", {className: "note", textContent: "as a table"}), makeTable(table)));
}

/* One row */
function makeSide(row, side) {
  const item = data.items[row.items[side]], label = data.views[state.view].labels[row.index];
  const rewards = row.items.map((place) => data.items[place].reward), other = rewards[1 - side];
  const reward = item.reward === null ? "no reward" : `reward ${item.reward.toFixed(4)}`;
  const title = [data.sides[side], row.models[side], reward];
  const caption = make("figcaption", {},
    make("span", {className: "side", textContent: title.filter(Boolean).join(" \u00b7 ")}));
  const note = (text) => caption.append(make("div", {}, make("strong", {textContent: text})));
  const badge = (is, text) => is && caption.append(make("span", {className: "badge", textContent: text}));
  badge(isPaired && label === (side ? -1 : 1), "people prefer it");
  badge(item.reward !== null && typeof other === "number" && item.reward > other, "the reward does");
  caption.append(make("div", {textContent: item.name}));
  if (item.note) note(item.note);
  if (item.clip === null) return make("figure", {}, caption);
  const video = make("video", {controls: true, muted: true, loop: true, preload: "none", playsInline: true});
  video.src = item.clip;
  video.setAttribute("aria-label", `clip ${data.sides[side]} of row ${row.number}`);
  video.addEventListener("error", () => video.hasAttribute("src") && note("the clip does not play here"));
  return make("figure", {}, video, caption);
}
function makeThought(row, side) {
  const {thought} = data.items[row.items[side]];
  if (thought === null) return make("div", {});
  const title = `thought ${data.sides[side]}`.trim() + `, ${thought.length} characters`;
  return make("details", {className: "thought"},
    make("summary", {textContent: title}), make("pre", {textContent: thought}));
}
function makeRow(row) {
  const view = data.views[state.view], verdict = view.verdicts[row.index], prompt = data.prompts[row.prompt];
  const labels = data.views.filter((one) => one.name).map((one) =>
    `${one.name}: ${LABELS.get(one.labels[row.index])} ${SIGNS[one.verdicts[row.index]]}`).join("  ");
  const article = make("article", {id: `row-${row.number}`, tabIndex: -1},
    make("div", {className: "heading"}, make("h3", {textContent: `#${row.number}`}),
      make("span", {className: `verdict ${verdict}`, textContent: `${SIGNS[verdict]} ${verdict}`}),
      make("span", {textContent: row.summary}), make("span", {className: "note", textContent: labels})));
  if (prompt.length > 400) {
    article.append(make("details", {}, make("summary", {textContent: prompt.slice(0, 200) + " ..."}),
      make("p", {className: "prompt", textContent: prompt})));
  } else article.append(make("p", {className: "prompt", textContent: prompt}));
  const each = (maker) => data.sides.map((_, side) => maker(row, side));
  article.append(make("div", {className: "sides"}, ...each(makeSide)));
  const videos = [...article.querySelectorAll("video")];
  if (videos.length) {
    const button = make("button", {type: "button", className: "play"});
    button.addEventListener("click", () => togglePlay(videos));
    followPlay(videos, button);
    article.append(button);
  }
  article.append(make("div", {className: "sides thoughts"}, ...each(makeThought)));
  if (row.scores.length) article.append(makeTable({columns: ["dimension", ...row.score_columns], rows: row.scores}));
  return article;
}

/* Clips that play together start together and, however long each is, start again together. */
const isReady = (video) => video.readyState >= 3 || video.error;
function makeReady(video) {
  if (isReady(video)) return null;
  return new Promise((done) => {
    for (const event of ["canplay", "error"]) video.addEventListener(event, done, {once: true});
    video.preload = "auto";
    if (!video.readyState) video.load();
  });
}
async function startTogether(videos) {
  await Promise.all(videos.map(makeReady));
  for (const video of videos) video.currentTime = 0;
  await Promise.allSettled(videos.map((video) => video.play()));
}
function togglePlay(videos) {
  const isPlaying = videos.some((video) => !video.paused);
  for (const video of videos) video.loop = isPlaying;
  if (isPlaying) videos.forEach((video) => video.pause());
  else startTogether(videos);
}
function followPlay(videos, button) {
  const update = () => {
    const isPlaying = videos.some((video) => !video.paused && !video.ended);
    button.textContent = (isPlaying ? "\u275a\u275a pause" : "\u25b6 play") + (videos.length > 1 ? " both" : "");
  };
  const restart = () => { if (videos.every((video) => video.ended || video.error)) startTogether(videos); };
  for (const video of videos) {
    for (const event of ["play", "pause"]) video.addEventListener(event, update);
    video.addEventListener("ended", restart);
  }
  update();
}
/* First frames of the clips in sight, no others. */
const watcher = new IntersectionObserver((entries) => {
  for (const {target, isIntersecting} of entries) {
    if (isIntersecting && target.preload === "none") target.preload = "metadata";
  }
});

/* The list */
function textOf(row) {
  if (row.text === undefined) {
    const items = row.items.map((place) => data.items[place]);
    const texts = items.flatMap((item) => [item.name, item.note, item.thought || ""]);
    row.text = [data.prompts[row.prompt], ...row.models, ...texts].join("\n").toLowerCase();
  }
  return row.text;
}
function choose() {
  const verdicts = data.views[state.view].verdicts, words = state.text.toLowerCase(), sort = state.sort;
  const order = state.descending ? -1 : 1;
  shown = data.rows.filter((row) => (!state.verdict || verdicts[row.index] === state.verdict)
    && state.facets.every((value, n) => !value || row.facets[n].includes(value))
    && (!words || textOf(row).includes(words)));
  shown.sort((one, two) => {
    const [a, b] = sort < 0 ? [one.number, two.number] : [one.numbers[sort], two.numbers[sort]];
    if (a === null || b === null) return (a === null) - (b === null) || one.number - two.number;
    return order * (a - b) || one.number - two.number;
  });
}
function show(page) {
  const last = Math.max(0, Math.ceil(shown.length / PAGE_SIZE) - 1);
  state.page = Math.min(Math.max(page, 0), last);
  for (const video of find("rows").querySelectorAll("video")) {
    watcher.unobserve(video);
    video.pause();
    video.removeAttribute("src");
    video.load();
  }
  find("rows").replaceChildren(...shown.slice(state.page * PAGE_SIZE, (state.page + 1) * PAGE_SIZE).map(makeRow));
  for (const video of find("rows").querySelectorAll("video")) watcher.observe(video);
  find("count").textContent = `${shown.length} of ${data.rows.length}`;
  find("page").textContent = `page ${state.page + 1} of ${last + 1}`;
  find("previous").disabled = state.page === 0;
  find("next").disabled = state.page === last;
}
function refresh() { choose(); show(0); }
function turn(by) {
  const before = state.page;
  show(before + by);
  if (state.page !== before) (find("rows").firstChild || find("toolbar")).scrollIntoView();
}
function fill(select, options) {
  select.replaceChildren(...options.map(([value, text]) => make("option", {value, textContent: text})));
}
function showView() {
  const view = data.views[state.view], count = (name) => view.verdicts.filter((one) => one === name).length;
  find("charts").replaceChildren(...view.charts.map(makeChart));
  find("view-tables").replaceChildren(...view.tables.map(makeTable));
  const choices = data.verdicts.map((name) => [name, `${name} (${count(name)})`]);
  fill(find("verdict"), [["", `all (${data.rows.length})`], ...choices]);
  find("verdict").value = state.verdict;
}
function showDirection() { find("direction").textContent = state.descending ? "\u2193 falling" : "\u2191 rising"; }
function moveBy(by) {
  const articles = [...find("rows").children], at = articles.indexOf(document.activeElement.closest("article"));
  const target = articles[at < 0 ? 0 : Math.min(Math.max(at + by, 0), articles.length - 1)];
  if (target) { target.focus({preventScroll: true}); target.scrollIntoView({block: "start"}); }
}
function current() { return document.activeElement.closest("article") || find("rows").firstChild; }
const KEYS = {
  j: () => moveBy(1), k: () => moveBy(-1), "[": () => turn(-1), "]": () => turn(1), "/": () => find("text").focus(),
  p: () => { const button = current() && current().querySelector(".play"); if (button) button.click(); },
  t: () => {
    const thoughts = current() ? [...current().querySelectorAll(".thought")] : [];
    const isOpen = thoughts.some((one) => one.open);
    for (const thought of thoughts) thought.open = !isOpen;
  },
};
function begin() {
  data.rows.forEach((row, index) => { row.index = index; });
  document.title = find("title").textContent = data.title;
  find("facts").append(...data.facts.flatMap(([name, value]) =>
    [make("dt", {textContent: name}), make("dd", {textContent: value})]));
  find("tables").append(...data.tables.map(makeTable));
  if (data.failures.length) {
    find("failures").hidden = false;
    find("failures").querySelector("summary").textContent = `${data.failures.length} failed`;
    find("failures").querySelector("pre").textContent = data.failures.join("\n");
  }
  fill(find("view"), data.views.map((view, place) => [String(place), view.name]));
  find("view").value = String(state.view);
  find("view-choice").hidden = data.views.length < 2;
  fill(find("sort"), [["-1", "row"], ...data.sorts.map((name, place) => [String(place), name])]);
  data.facets.forEach((name, n) => {
    const values = [...new Set(data.rows.flatMap((row) => row.facets[n]))];
    values.sort((a, b) => a.localeCompare(b, undefined, {numeric: true}));
    const select = make("select", {id: `facet-${n}`});
    fill(select, [["", "all"], ...values.map((value) => [value, value])]);
    select.addEventListener("change", () => { state.facets[n] = select.value; refresh(); });
    find("facets").append(make("label", {}, `${name} `, select), " ");
  });
  const on = (id, event, action) => find(id).addEventListener(event, action);
  on("view", "change", () => { state.view = Number(find("view").value); showView(); refresh(); });
  on("verdict", "change", () => { state.verdict = find("verdict").value; refresh(); });
  on("sort", "change", () => { state.sort = Number(find("sort").value); refresh(); });
  on("direction", "click", () => { state.descending = !state.descending; showDirection(); refresh(); });
  on("text", "input", () => { state.text = find("text").value; refresh(); });
  on("previous", "click", () => turn(-1));
  on("next", "click", () => turn(1));
  document.addEventListener("keydown", (event) => {
    const isTyping = event.target.closest("input, select, video"), action = KEYS[event.key];
    if (!action || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  });
  showDirection();
  showView();
  refresh();
}
begin();
