"use strict";
// Everything on the page is made here, from the JSON above; text enters as text nodes, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");
const COLORS = 8;
const DASHES = [[], [7, 3], [2, 2], [9, 3, 2, 3], [4, 4], [12, 4], [1, 3], [7, 3, 2, 3, 2, 3]];

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "onclick") element.addEventListener("click", value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// Bytes of a file name that are no UTF-8 arrive as lone surrogates.
function shown(text) {
  return String(text).replace(/[\ud800-\udbff][\udc00-\udfff]|[\ud800-\udfff]/g, (found) =>
    found.length === 2 ? found : "\\x" + (found.charCodeAt(0) & 0xff).toString(16).padStart(2, "0"));
}
const name = (text) => make("bdi", { class: "name" }, shown(text));  // of any script, kept apart from its neighbors

function number(value, digits) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && digits === undefined) return String(value);
  return digits === undefined ? String(Number(value.toPrecision(6))) : value.toFixed(digits);
}
const percent = (part, whole) => (whole ? 100 * part / whole : null);

const last = (values) => (values.length ? values[values.length - 1] : null);

// ---- sections and tables -----------------------------------------------------------------------------------------

function section(id, title, ...children) {
  const heading = make("h2", { id: id + "-title" }, title);
  main.append(make("section", { id, "aria-labelledby": id + "-title", tabindex: -1 }, heading, ...children));
  document.getElementById("sections").append(make("li", {}, make("a", { href: "#" + id }, title)));
}

// columns: {title, value(row), text(row)?: string or node, number?: bool}; a click on a title sorts.
function table(columns, rows, { caption, limit = 25, sortable = true, rowClass } = {}) {
  const body = make("tbody");
  let ordered = [...rows], all = rows.length <= limit;
  const heads = columns.map((column, i) => {
    const head = make("th", { scope: "col", class: column.number && "number" });
    head.append(sortable && rows.length > 1 ? make("button", { type: "button", onclick: () => sort(i) }, column.title)
      : column.title);
    return head;
  });
  function sort(i) {
    const down = heads[i].getAttribute("aria-sort") === "ascending", value = columns[i].value;
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[i].setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1;
    ordered.sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === null || x === undefined) return y === null || y === undefined ? 0 : 1;
      if (y === null || y === undefined) return -1;
      return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
    });
    fill();
  }
  function fill() {
    body.replaceChildren(...(all ? ordered : ordered.slice(0, limit)).map((row) =>
      make("tr", { class: rowClass && rowClass(row) }, ...columns.map((column) => {
        const content = column.text ? column.text(row) : column.value(row);
        const text = typeof content === "number" || content === null || content === undefined ? number(content) : content;
        return make("td", { class: column.number ? "number" : "text" }, text);
      }))));
  }
  fill();
  const scroll = make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body));
  if (all) return scroll;
  const more = make("button", { type: "button", onclick: () => {
    all = !all;
    scroll.classList.toggle("tall", all);
    more.textContent = all ? `Show ${limit} rows` : `Show all ${rows.length} rows`;
    fill();
  } }, `Show all ${rows.length} rows`);
  return make("div", {}, scroll, make("p", {}, more));
}

// A table that is built when it is opened.
function tableLater(title, build) {
  const details = make("details", {}, make("summary", {}, title));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(build());
  });
  return details;
}

// ---- charts ------------------------------------------------------------------------------------------------------

const AXIS = { labelColor: "var(--dim)", titleColor: "var(--dim)", gridColor: "var(--line)", domainColor: "var(--line)",
  tickColor: "var(--line)", labelFlush: false, labelOverlap: "greedy", labelSeparation: 8, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
const CONFIG = { background: null, font: "system-ui, Segoe UI, Roboto, sans-serif", view: { stroke: null }, axis: AXIS };

async function draw(place, spec) {
  try {
    const full = { width: "container", height: 220,
      autosize: { type: "fit-x", contains: "padding" }, config: CONFIG, ...spec };
    await vegaEmbed(place, full, { renderer: "svg", actions: false, mode: "vega-lite",
      tooltip: { theme: "custom", sanitize: (value) => shown(value).replace(/&/g, "&amp;").replace(/</g, "&lt;") } });
  } catch (error) {
    console.error(error);
    place.textContent = "This chart could not be drawn; its table is below.";
  }
}

function sample(color, dash) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [key, value] of [["width", 34], ["height", 10], ["aria-hidden", "true"]]) svg.setAttribute(key, value);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  for (const [key, value] of Object.entries({ x1: 1, x2: 33, y1: 5, y2: 5, stroke: color, "stroke-width": 2.5,
    "stroke-dasharray": dash.join(" ") })) line.setAttribute(key, value);
  svg.append(line);
  return svg;
}

const style = (i) => [`var(--c${i % COLORS})`, DASHES[(i + Math.floor(i / COLORS)) % DASHES.length]];

// series: [{label, points: [{x, y}], style: index}]; a line each, with a table of the same numbers.
function lineChart(title, unit, series, xTitle) {
  series = series.filter((one) => one.points.length);
  if (!series.length) return null;
  const plot = make("div", { class: "plot" });
  const values = series.flatMap((one, i) => one.points.map((point) => ({ x: point.x, y: point.y, s: i, label: shown(one.label) })));
  const domain = series.map((_, i) => i);
  const few = values.length <= 400, sizes = values.map((point) => point.y).sort((a, b) => a - b);
  const isWide = title.includes("oss") && sizes[0] > 0 && last(sizes) > 20 * sizes[Math.floor(sizes.length / 2)];
  draw(plot, {
    description: `${title}: ${series.length} line(s) over ${xTitle}. The table below holds the numbers.`,
    data: { values },
    mark: { type: "line", strokeWidth: values.length > 1000 ? 1.25 : 2, interpolate: "linear",
      point: few ? { size: series.some((one) => one.points.length === 1) ? 70 : values.length > 60 ? 14 : 26, filled: true } : false },
    encoding: {
      x: { field: "x", type: "quantitative", title: xTitle, scale: { nice: false, zero: false, padding: 5 },
        axis: { grid: false, tickCount: 6 } },
      y: { field: "y", type: "quantitative", title: isWide ? `${unit} (logarithmic)` : unit, scale: isWide ? { type: "log" } : { zero: false, nice: true }, axis: { tickCount: 6 } },
      color: { field: "s", type: "nominal", legend: null, scale: { domain, range: series.map((one) => style(one.style)[0]) } },
      strokeDash: { field: "s", type: "nominal", legend: null, scale: { domain, range: series.map((one) => style(one.style)[1]) } },
      tooltip: [{ field: "label", title: "line" }, { field: "x", title: xTitle, format: ".4~g" }, { field: "y", title: unit || "value", format: ".6~g" }],
    },
  });
  const legend = make("ul", { class: "legend" }, ...series.map((one) =>
    make("li", {}, sample(...style(one.style)), name(one.label))));
  const rows = series.flatMap((one) => one.points.map((point) => ({ label: one.label, ...point })));
  const columns = [{ title: xTitle, value: (row) => row.x, number: true }, { title: unit || title, value: (row) => row.y, text: (row) => String(row.y), number: true }];
  if (series.length > 1) columns.unshift({ title: "line", value: (row) => row.label, text: (row) => name(row.label) });
  return make("figure", {}, make("figcaption", {}, title), legend, plot,
    tableLater("Numbers of this chart", () => table(columns, rows, { caption: title, limit: 50 })));
}

// ---- runs --------------------------------------------------------------------------------------------------------

const folderName = (path) => shown(path).replace(/\/+$/, "").split("/").slice(-2).join("/");
const runs = data.runs.map((run) => ({ ...run, label: folderName(run.folder) }));
runs.forEach((run) => { if (runs.filter((other) => other.label === run.label).length > 1) run.label = shown(run.folder); });

// Runs of very different lengths are drawn over their share, others over epochs.
const isUneven = (ends) => Math.max(...ends) > 3 * Math.min(...ends.filter((end) => end > 0));
const ends = runs.map((run) => Math.max(last(run.train.position) || 0, last(run.val.position) || 0));
const byShare = isUneven(ends), xTitle = byShare ? "part of the run, %" : "epoch";
function points(run, part, column) {
  const factor = byShare ? 100 / ends[runs.indexOf(run)] : 1;
  return run[part].position.map((x, i) => ({ x: x * factor, y: run[part][column][i] })).filter((point) => point.y !== null);
}
function curves() {
  const one = runs.length === 1, chart = (title, unit, series) => lineChart(title, unit, series, xTitle);
  const of = (part, column) => runs.map((run, i) => ({ label: run.label, points: points(run, part, column), style: i }));
  const both = (column) => [{ label: "training", points: points(runs[0], "train", column), style: 0 },
    { label: "validation", points: points(runs[0], "val", column), style: 1 }];
  const figures = one
    ? [chart("Loss", "loss", both("loss")), chart("Top-1 accuracy", "%", both("acc1"))]
    : [chart("Validation top-1", "%", of("val", "acc1")), chart("Validation loss", "loss", of("val", "loss")),
       chart("Training top-1", "%", of("train", "acc1")), chart("Training loss", "loss", of("train", "loss"))];
  if (runs.some((run) => run.val.acc5.some((value) => value !== null && value < 100))) figures.push(chart("Validation top-5", "%", of("val", "acc5")));
  figures.push(chart("Throughput", "images/s", of("train", "fps")), chart("Learning rate", "", of("train", "lr")));
  return figures;
}

function facts(rows) {  // rows: [title, run -> text or number]
  const columns = [{ title: "", value: (row) => row[0] }, ...runs.map((run) => ({ title: name(run.label),
    value: (row) => row[1](run), text: (row) => { const value = row[1](run); return typeof value === "string" ? name(value) : number(value); } }))];
  return table(columns, rows.filter((row) => runs.some((run) => row[1](run) !== null && row[1](run) !== undefined)), { caption: "facts of the runs", sortable: false, limit: 100 });
}
const summary = (key, digits) => (run) => { const value = run.summary ? run.summary[key] : null; return typeof value === "number" && digits !== undefined ? number(value, digits) : value; };

function overview() {
  const table_ = facts([
    ["network", (run) => (run.config ? run.config.arch : null)],
    ["recipe", (run) => (run.config ? run.config.recipe : null)],
    ["best validation top-1, %", (run) => (run.summary ? run.summary.best_acc1 : run.val.acc1.reduce((a, b) => Math.max(a, b), -1) >= 0 ? Math.max(...run.val.acc1) : null)],
    ["in epoch", summary("best_epoch")],
    ["top-1 of the last epoch, %", (run) => last(run.val.acc1)],
    ["validation images", (run) => last(run.val.seen)],
    ["loss of the last epoch: training", (run) => last(run.train.loss)],
    ["loss of the last epoch: validation", (run) => last(run.val.loss)],
    ["steps", summary("steps")],
    ["throughput, images/s", summary("images_per_s")],
    ["duration, s", summary("duration_s", 1)],
    ["folder", (run) => run.folder],
  ]);
  const notes = runs.flatMap((run) => [
    !run.summary && `${run.label} has no summary.json: it has not ended, or was stopped.`,
    run.unread && `${run.label}: ${run.unread} line(s) of metrics.jsonl are torn and left out.`,
    run.train.epoch.length < run.train_records && `${run.label}: the curves show ${run.train.epoch.length} of ${run.train_records} training records, at equal distances and the last of each epoch.`,
    run.bad_images.length && `${run.label}: ${run.bad_images.length} image(s) did not decode in training.`,
  ]).filter(Boolean).map((text) => make("p", { class: "dim" }, text));
  section("overview", "Overview", table_, ...notes);
}

// ---- evaluations -------------------------------------------------------------------------------------------------

function heading(evaluation) {
  return data.evaluations.length > 1 ? make("h3", {}, name(evaluation.source)) : null;
}
const className = (evaluation, k) => name(evaluation.classes[k]);
const nameOf = (evaluation, index) => name(evaluation.names[index] ?? "background");  // of an index of the network

function perClass(evaluation) {
  const trained = runs.map((run) => run.folder === evaluation.run && run.data_set.train).find(Boolean);
  const rows = evaluation.per_class.map(([images, correct, guessed], k) => ({ k, images, correct, guessed, wrong: images - correct, accuracy: percent(correct, images), precision: percent(correct, guessed) }))
    .filter((row) => row.images || row.guessed);
  rows.sort((a, b) => (a.accuracy === null) - (b.accuracy === null) || a.accuracy - b.accuracy || b.images - a.images);
  const bar = (value) => make("span", { class: "bar", "aria-hidden": "true" }, make("span", { style: `width:${value || 0}%` }));
  const columns = [
    { title: "class", value: (row) => shown(evaluation.classes[row.k]), text: (row) => className(evaluation, row.k) },
    { title: "images", value: (row) => row.images, number: true },
    { title: "right", value: (row) => row.correct, number: true },
    { title: "accuracy, %", value: (row) => row.accuracy, text: (row) => make("span", {}, bar(row.accuracy), make("span", { class: "beside" }, number(row.accuracy, row.accuracy === null ? undefined : 1))), number: true },
    { title: "guessed", value: (row) => row.guessed, number: true },
    { title: "right of guessed, %", value: (row) => row.precision, text: (row) => number(row.precision, row.precision === null ? undefined : 1), number: true },
  ];
  if (trained && trained.classes.length) {
    const counts = new Map(trained.classes.map((each, i) => [each, trained.per_class[i]]));
    columns.splice(1, 0, { title: "training images", value: (row) => counts.get(evaluation.classes[row.k]), number: true });
  }
  const left = [evaluation.unlabeled && `${evaluation.unlabeled} without label`, evaluation.failed && `${evaluation.failed} that do not decode`].filter(Boolean);
  const top5 = evaluation.classes.length > 5 ? `; top-5: ${evaluation.correct5}, ${number(percent(evaluation.correct5, evaluation.images), 2)} %` : "";
  const parts = [heading(evaluation),
    make("p", {}, `${evaluation.correct} of ${evaluation.images} images are right: ${number(percent(evaluation.correct, evaluation.images), 2)} %${top5}. ` + (left.length ? `Not counted: ${left.join(", ")}.` : "")),
    make("p", { class: "dim" }, "From ", name(evaluation.source))];
  if (rows.length > 30) parts.push(histogram(rows));
  parts.push(table(columns, rows, { caption: "accuracy of each class", limit: 20 }));
  return make("div", {}, ...parts.filter(Boolean));
}

function histogram(rows) {
  const plot = make("div", { class: "plot" });
  const counts = Array.from({ length: 10 }, (_, i) => ({ from: 10 * i, to: 10 * i + 10, classes: 0 }));
  rows.filter((row) => row.images).forEach((row) => { counts[Math.min(9, Math.floor(row.accuracy / 10))].classes += 1; });
  draw(plot, { description: "number of classes by accuracy", data: { values: counts }, height: 160,
    mark: { type: "bar", color: "var(--c0)", binSpacing: 2 },
    encoding: { x: { field: "from", bin: { binned: true, step: 10 }, title: "accuracy of a class, %", axis: { grid: false } }, x2: { field: "to" },
      y: { field: "classes", type: "quantitative", title: "classes", axis: { tickCount: 5 } }, tooltip: [{ field: "from", title: "from, %" }, { field: "to", title: "to, %" }, { field: "classes" }] } });
  return make("figure", {}, make("figcaption", {}, "Classes by accuracy"), plot,
    tableLater("Numbers of this chart", () => table([{ title: "from, %", value: (row) => row.from, number: true }, { title: "to, %", value: (row) => row.to, number: true }, { title: "classes", value: (row) => row.classes, number: true }], counts, { caption: "classes by accuracy" })));
}

function confusion(evaluation) {
  const parts = [heading(evaluation)];
  if (evaluation.matrix) parts.push(matrix(evaluation));
  if (!evaluation.pairs.length) parts.push(make("p", {}, "No image is wrong."));
  else {
    const of = (truth) => evaluation.per_class[truth][0];
    const columns = [
      { title: "truth", value: ([truth]) => shown(evaluation.classes[truth]), text: ([truth]) => className(evaluation, truth) },
      { title: "taken for", value: ([, guess]) => shown(evaluation.classes[guess]), text: ([, guess]) => className(evaluation, guess) },
      { title: "images", value: (pair) => pair[2], number: true },
      { title: "of the class, %", value: (pair) => percent(pair[2], of(pair[0])), text: (pair) => number(percent(pair[2], of(pair[0])), 1), number: true },
    ];
    const all = evaluation.all_pairs > evaluation.pairs.length ? ` The ${evaluation.pairs.length} most frequent of ${evaluation.all_pairs} pairs.` : "";
    parts.push(make("h3", {}, "Pairs that are confused most"), make("p", { class: "dim" }, `Click a heading to sort.${all}`), table(columns, evaluation.pairs, { caption: "confused pairs", limit: 15 }));
  }
  return make("div", {}, ...parts.filter(Boolean));
}

function matrix(evaluation) {
  const n = evaluation.classes.length, counts = evaluation.per_class.map(([, correct], k) => Array.from({ length: n }, (_, j) => (j === k ? correct : 0)));
  evaluation.pairs.forEach(([truth, guess, images]) => { counts[truth][guess] = images; });
  const head = make("tr", {}, make("th", { scope: "col" }, "truth ↓ guess →"), ...evaluation.classes.map((each) => make("th", { scope: "col", class: "turned" }, name(each))));
  const rows = counts.map((row, k) => make("tr", {}, make("th", { scope: "row" }, className(evaluation, k)), ...row.map((count, j) => {
    const share = percent(count, evaluation.per_class[k][0]) || 0;
    return make("td", { class: j === k && "hit", style: `background: rgba(var(--shade), ${(0.75 * share / 100).toFixed(3)})`, title: `${number(share, 1)} % of the class` }, String(count));
  })));
  return make("div", { class: "scroll matrix", tabindex: 0, role: "region", "aria-label": "confusion matrix" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}

const picture = (source, text) => (source ? make("img", { src: source, alt: shown(text) }) : make("p", { class: "dim" }, "The file is not there any more."));
function mistakes(evaluation) {
  const cards = evaluation.mistakes.map((each) => {
    const [guess, probability] = each.best[0], file = shown(each.path).split("/").pop();
    return make("li", {},
      make("div", { class: each.heat ? "pictures two" : "pictures" }, picture(each.picture, file), each.heat && make("img", { src: each.heat, alt: `Grad-CAM of ${file}` })),
      make("div", {}, "guess: ", make("span", { class: "guess" }, nameOf(evaluation, guess)), ` ${number(100 * probability, 2)}\u00a0%`),
      make("div", {}, "truth: ", make("span", { class: "truth" }, nameOf(evaluation, each.label))),
      make("details", {}, make("summary", {}, `${each.best.length} best classes`), make("ol", {}, ...each.best.map(([k, p]) => make("li", {}, nameOf(evaluation, k), make("span", {}, `${number(100 * p, 2)} %`))))),
      make("p", { class: "path" }, name(each.path)));
  });
  return make("div", {}, heading(evaluation), cards.length ? make("ul", { class: "cards" }, ...cards) : make("p", {}, "No image is wrong."),
    evaluation.mistakes.some((each) => each.heat) && make("p", { class: "dim" }, "Right pictures: Grad-CAM, bright where the image raises the guess, on the center crop that the network takes."));
}

// ---- comparisons -------------------------------------------------------------------------------------------------

function study() {
  const { rows, curves: bands, source } = data.study;
  const label = (row) => (row.options ? `${row.name} ${row.options}` : row.name);
  const recipes = [...new Set(rows.map(label))];
  const statistics = recipes.map((recipe) => {
    const values = rows.filter((row) => label(row) === recipe).map((row) => row.acc1);
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    const spread = values.length > 1 ? Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (values.length - 1)) : null;
    return { recipe, runs: values.length, mean, spread, low: Math.min(...values), high: Math.max(...values) };
  });
  const recipeColumn = { title: "recipe", value: (row) => row.recipe, text: (row) => name(row.recipe) };
  const column = (title, key, digits) => ({ title, value: (row) => row[key], text: (row) => number(row[key], row[key] === null ? undefined : digits), number: true });
  const parts = [make("p", { class: "dim" }, name(source), ": best validation top-1 of each seed; spread: sample standard deviation."),
    table([recipeColumn, column("seeds", "runs"), column("mean, %", "mean", 2), column("spread", "spread", 2), column("lowest, %", "low", 2), column("highest, %", "high", 2)], statistics, { caption: "recipes" })];
  if (bands.length) {
    const names = [...new Set(bands.map((row) => row.recipe))], domain = names.map((_, i) => i), plot = make("div", { class: "plot" });
    const lengths = names.map((each) => Math.max(...bands.filter((row) => row.recipe === each).map((row) => row.epoch))), share = isUneven(lengths);
    const values = bands.map((row) => { const s = names.indexOf(row.recipe); return { ...row, s, x: share ? 100 * row.epoch / lengths[s] : row.epoch }; });
    const color = { field: "s", type: "nominal", legend: null, scale: { domain, range: domain.map((i) => style(i)[0]) } };
    const dash = { field: "s", type: "nominal", legend: null, scale: { domain, range: domain.map((i) => style(i)[1]) } };
    draw(plot, { description: "mean and range of validation top-1 over the seeds", data: { values }, height: 260,
      encoding: { x: { field: "x", type: "quantitative", title: share ? "part of the run, %" : "epoch", axis: { grid: false, tickCount: 8 } }, color },
      layer: [{ mark: { type: "area", opacity: 0.25 }, encoding: { y: { field: "low", type: "quantitative", title: "validation top-1, %", scale: { zero: false } }, y2: { field: "high" } } },
        { mark: { type: "line", strokeWidth: 2, point: values.length <= 60 ? { size: 40, filled: true } : false }, encoding: { y: { field: "mean", type: "quantitative" }, strokeDash: dash } }] });
    parts.push(make("figure", {}, make("figcaption", {}, "Mean of the seeds, and their range as a band"), make("ul", { class: "legend" }, ...names.map((each, i) => make("li", {}, sample(...style(i)), name(each)))), plot,
      tableLater("Numbers of this chart", () => table([recipeColumn, column("epoch", "epoch"), column("lowest, %", "low"), column("mean, %", "mean"), column("highest, %", "high"), column("seeds", "seeds")], bands, { caption: "validation top-1 over the seeds", limit: 50 }))));
  }
  parts.push(make("h3", {}, "Runs"), table([{ title: "recipe", value: label, text: (row) => name(label(row)) }, column("seed", "seed"), column("best top-1, %", "acc1"), column("last epoch, %", "acc1_last"), column("epochs", "epochs"), column("seconds", "seconds"),
    { title: "what", value: (row) => row.what || "", text: (row) => name(row.what || "") }], rows, { caption: "runs of the study" }));
  section("study", "Study", ...parts);
}

const reached = (row) => (row.limit ? shown(row.limit) + (row.fraction ? `: ${Math.round(100 * row.fraction)} %` : "") : "");

function bench() {
  const ratios = data.benches.rows.map((row, i) => ({ ...row, i, label: shown(row.what), low: row.range ? row.range[0] : row.ratio, high: row.range ? row.range[1] : row.ratio,
    bound: row.fraction ? row.ratio / row.fraction : null, reached: reached(row) }));
  const plot = make("div", { class: "plot bars" });
  const y = { field: "i", type: "ordinal", title: null, axis: { labels: false, ticks: false, domain: false } };
  const x = (field) => ({ field, type: "quantitative", title: "times as fast as the peer (logarithmic)", scale: { type: "log" }, axis: { format: "~g", tickCount: 6 } });
  const tip = [{ field: "label", title: "what" }, { field: "against", title: "against" }, { field: "ratio" }, { field: "low" }, { field: "high" }, { field: "reached", title: "limit, share reached" }];
  draw(plot, { description: "ratio to the peer with its range and its limit", height: 34 * ratios.length, data: { values: ratios }, encoding: { y },
    layer: [
      { mark: { type: "bar", height: 12, yOffset: 8, color: "var(--c0)" }, encoding: { x: x("ratio"), x2: { datum: 1 }, tooltip: tip } },
      { mark: { type: "rule", yOffset: 8, color: "var(--text)", strokeWidth: 1.5 }, encoding: { x: x("low"), x2: { field: "high" } } },
      ...(ratios.some((row) => row.bound) ? [{ transform: [{ filter: "isNumber(datum.bound)" }], mark: { type: "tick", yOffset: 8, thickness: 3, size: 20, color: "var(--c3)" }, encoding: { x: x("bound"), tooltip: tip } }] : []),
      { mark: { type: "rule", color: "var(--c1)", strokeDash: [5, 3], strokeWidth: 2 }, encoding: { x: { datum: 1 }, y: null } },
      { mark: { type: "text", align: "left", baseline: "middle", yOffset: -8, color: "var(--text)", limit: 1200, fontSize: 12 }, encoding: { x: { value: 0 }, text: { field: "label" } } }] });
  const fields = [["what", "what"], ["against", "against"], ["ratio", "ratio"]];
  section("benches", "Against peers", make("p", { class: "dim" }, name(data.benches.source), ": bars: median ratio; thin line: range of single pairs; dashed line: as fast as the peer; tick: where the measured limit of a row lies, of which the table names the share that was reached."),
    ratios.length && make("figure", {}, make("figcaption", {}, "Speed against peers"), plot),
    table([...fields.map(([title, key]) => ({ title, value: (row) => row[key], number: key === "ratio", text: key === "ratio" ? undefined : (row) => name(row[key]) })),
      { title: "range", value: (row) => (row.range ? row.range.join(" to ") : ""), }, { title: "limit, share reached", value: reached, text: (row) => name(reached(row)) },
      { title: "device", value: (row) => row.device || "", text: (row) => name(row.device || "") }, { title: "note", value: (row) => row.note || "", text: (row) => name(row.note || "") }], data.benches.rows, { caption: "rows of benchmarks", limit: 15 }));
}

function comparison() {
  const found = data.comparison;
  const side = (letter) => ({ letter: letter.toUpperCase(), name: found[letter].name, hits: found[letter].correct && found[letter].correct[0], ms: found[letter].milliseconds_per_image });
  const keys = ["largest_difference", "mean_difference", "relative_error", "cosine"].filter((key) => key in found);
  const two = (title, rows) => table([{ title, value: (row) => row[0] }, { title: "value", value: (row) => row[1], number: true }], rows, { caption: title, sortable: false });
  section("comparison", "Two models", make("p", {}, name(found.source), `: ${found.agreed} of ${found.images} images have the same top-1.`),
    table([{ title: "", value: (row) => row.letter }, { title: "model", value: (row) => row.name, text: (row) => name(row.name) }, { title: "right at top-1", value: (row) => row.hits, number: true }, { title: "ms an image", value: (row) => row.ms, number: true }], [side("a"), side("b")], { caption: "both models", sortable: false }),
    make("h3", {}, "Differences of the logits"), two("measure", keys.map((key) => [key.replace("_", " "), found[key]])),
    ...[found.causes && make("p", {}, `Cause: ${found.causes.join("; ")}`),
      found.layers.length > 0 && make("h3", {}, "Relative error after each block"), found.layers.length > 0 && two("block", found.layers.map((each) => [each.name, each.error])),
      found.changed.length > 0 && make("h3", {}, "Images whose class changes"),
      found.changed.length > 0 && make("ul", { class: "cards" }, ...found.changed.map((row) => make("li", {}, make("div", { class: "pictures" }, picture(row.picture, row.path)),
        ...["a", "b"].map((letter) => { const each = row[`class_${letter}`]; return make("div", {}, `${letter.toUpperCase()}: `, make("span", { class: row.label ? (each === row.label ? "truth" : "guess") : null }, name(each)), ` ${number(100 * row[`probability_${letter}`], 2)} %`, row.label ? (each === row.label ? " (right)" : " (wrong)") : ""); }),
        row.label && make("div", {}, "truth: ", name(row.label)), make("p", { class: "path" }, name(row.path)))))].filter(Boolean));
}

function sweep() {
  const names = [...new Set(data.sweep.map((row) => row.model.replace(/_?bs\d+/i, "")))];
  section("sweep", "Batch sweep", lineChart("Throughput of the network by batch size", "images/s", names.map((each, i) => ({ label: each || "model", style: i, points: data.sweep.filter((row) => row.model.replace(/_?bs\d+/i, "") === each).map((row) => ({ x: row.batch, y: row["images/s"] })) })), "batch size"),
    table([{ title: "model", value: (row) => row.model, text: (row) => name(row.model) }, { title: "batch", value: (row) => row.batch, number: true }, { title: "images/s", value: (row) => row["images/s"], number: true }, { title: "summary", value: (row) => row.file, text: (row) => name(row.file) }], data.sweep, { caption: "batch sweep" }));
}

// ---- configuration, environment, data ----------------------------------------------------------------------------

const written = (value) => (value === null || value === undefined ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value));
function configuration() {
  const parts = runs.flatMap((run) => {
    const columns = [{ title: "option", value: (row) => row[0] }, { title: "value", value: (row) => written(row[1]), text: (row) => name(written(row[1])) }];
    const recipe = { title: run.config ? `recipe ${run.config.recipe}` : "recipe", value: (row) => written(row[2]), text: (row) => name(written(row[2])) };
    const all = Object.entries(run.config || {});
    return [runs.length > 1 && make("h3", {}, name(run.label)), !run.config && make("p", {}, "config.json is missing."),
      run.differs.length > 0 ? table([...columns, recipe], run.differs, { caption: "options that differ from the recipe", limit: 100, sortable: false }) : run.has_recipe && make("p", {}, "All options are those of the recipe."),
      all.length > 0 && tableLater(`All ${all.length} entries of config.json`, () => table(columns, all, { caption: "all options", limit: 200, sortable: false })),
      run.bad_images.length > 0 && tableLater(`${run.bad_images.length} files that do not decode`, () => table([{ title: "path", value: (row) => row.path, text: (row) => name(row.path) }, { title: "reason", value: (row) => row.reason, text: (row) => name(row.reason) }], run.bad_images, { caption: "files that do not decode" }))];
  });
  section("configuration", "Configuration", make("p", { class: "dim" }, "Options that differ from the recipe's come first."), ...parts.filter(Boolean));
}

function environment() {
  section("environment", "Environment", facts([["device", summary("device")], ["ranks", summary("ranks")], ["mixed precision", (run) => (run.summary ? run.summary.amp || "off" : null)], ["memory format", summary("memory_format")],
    ["torch", summary("torch")], ["Python", summary("python")]]));
}

function dataSet() {
  const rows = runs.flatMap((run) => Object.entries(run.data_set).map(([part, each]) => ({ run, part, each })));
  if (!rows.length) { section("data", "Data set", make("p", {}, "The images are not there any more.")); return; }
  const extreme = (counts, most) => (counts.length ? counts.reduce((a, b) => (most ? Math.max(a, b) : Math.min(a, b))) : null);
  section("data", "Data set", table([...(runs.length > 1 ? [{ title: "run", value: (row) => row.run.label, text: (row) => name(row.run.label) }] : []), { title: "part", value: (row) => row.part },
    { title: "images", value: (row) => row.each.images, number: true }, { title: "classes", value: (row) => row.each.classes.length || null, number: true },
    { title: "smallest class", value: (row) => extreme(row.each.per_class, false), number: true }, { title: "largest class", value: (row) => extreme(row.each.per_class, true), number: true },
    { title: "other files", value: (row) => row.each.ignored, number: true }, { title: "folder", value: (row) => row.each.folder, text: (row) => name(row.each.folder) }], rows, { caption: "data set" }));
}

// ---- the page ----------------------------------------------------------------------------------------------------

function themes() {
  const button = document.getElementById("theme"), root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = isDark() ? "Light colors" : "Dark colors"; };
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); });
  dark.addEventListener("change", label);
  label();
}

themes();
document.title = shown(data.title);
document.getElementById("title").replaceChildren(name(data.title));
document.getElementById("made").append("Made by ", make("code", {}, shown(data.command)));
if (runs.length) {
  overview();
  section("curves", "Curves", make("div", { class: "charts" }, ...curves().filter(Boolean)));
}
if (data.evaluations.length) {
  section("classes", "Accuracy by class", ...data.evaluations.map(perClass));
  section("confusion", "Confused classes", ...data.evaluations.map(confusion));
  section("mistakes", "Most confident mistakes", ...data.evaluations.map(mistakes));
}
if (data.comparison) comparison();
if (data.study) study();
if (data.benches) bench();
if (data.sweep.length) sweep();
if (runs.length) { configuration(); environment(); dataSet(); }
