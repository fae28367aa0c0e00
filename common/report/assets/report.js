"use strict";
// Shows the JSON of #data. Text is set by textContent only: names of classes and files are never read as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  // The palette of Okabe and Ito, in an order of contrast with the background.
  const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f"];
  const DARK = ["#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#9f9f9f"];
  const FIRST = "#0072b2", SECOND = "#d55e00";
  const DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]];
  const charts = []; // functions that draw a chart anew, after a change of the theme
  const main = document.getElementById("main");

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    for (const child of children.flat()) made.append(child);
    return made;
  }

  function section(id, title, note) {
    const made = element("section", { id, "aria-labelledby": `${id}-title` }, element("h2", { id: `${id}-title` }, title));
    if (note) made.append(element("p", { class: "note" }, note));
    main.append(made);
    document.getElementById("nav").append(element("a", { href: `#${id}` }, title));
    return made;
  }

  const percentage = (share) => `${(100 * share).toFixed(1)} %`;
  const isNumber = (value) => typeof value === "number";
  function shown(value) {
    if (value === null || value === undefined) return "";
    if (!isNumber(value)) return typeof value === "object" ? JSON.stringify(value) : String(value);
    return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(6)));
  }

  // A table of rows (arrays); a click on a column sorts by it.
  function table(columns, rows, caption) {
    const body = element("tbody");
    const heads = columns.map((name, i) => {
      const button = element("button", { type: "button" }, name);
      const isRight = rows.length > 0 && rows.every((row) => isNumber(row[i]) || row[i] === null);
      const head = element("th", { scope: "col", class: isRight ? "number" : "" }, button);
      button.addEventListener("click", () => {
        const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", direction);
        const sign = direction === "ascending" ? 1 : -1;
        fill([...rows].sort((a, b) => sign * (isNumber(a[i]) && isNumber(b[i]) ? a[i] - b[i] : shown(a[i]).localeCompare(shown(b[i])))));
      });
      return head;
    });
    function fill(ordered) {
      body.replaceChildren(...ordered.map((row) => element("tr", {}, row.map((value) => element("td", { class: isNumber(value) ? "number" : "" }, shown(value))))));
    }
    fill(rows);
    const made = element("table", { "aria-label": caption }, element("thead", {}, element("tr", {}, heads)), body);
    return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, made);
  }

  function config() {
    const style = getComputedStyle(document.documentElement);
    const [fg, line] = ["--fg", "--line"].map((name) => style.getPropertyValue(name).trim());
    return {
      background: null, font: "system-ui, sans-serif", view: { stroke: line },
      axis: { labelColor: fg, titleColor: fg, gridColor: line, domainColor: line, tickColor: line, labelFontSize: 11, tickCount: 8 },
      legend: { labelColor: fg, titleColor: fg, orient: "bottom", labelLimit: 260, columns: 2, symbolType: "stroke", symbolStrokeColor: fg, symbolStrokeWidth: 2.5, symbolSize: 400 },
      range: { category: document.documentElement.dataset.theme === "dark" ? DARK : LIGHT }, text: { color: fg },
    };
  }

  // A chart with its values as a table, which is made when it is opened.
  function chart(parent, title, spec, values, columns) {
    const target = element("div", { class: "chart", role: "img", "aria-label": `Chart: ${title}` });
    const numbers = element("details", {}, element("summary", {}, `Values of "${title}" as a table`));
    numbers.addEventListener("toggle", () => {
      if (numbers.open && numbers.children.length === 1) numbers.append(table(columns, values.map((row) => columns.map((name) => row[name] ?? null)), title));
    });
    parent.append(element("figure", {}, element("figcaption", {}, title), target, numbers));
    const draw = () => window.vegaEmbed(target, {
      $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: "container", height: 230, autosize: { type: "fit-x", contains: "padding" },
      data: { values }, config: config(), ...spec,
    }, { actions: false, renderer: "svg", logLevel: 1 }).catch((error) => console.error(title, error));
    charts.push(draw);
    draw();
  }

  const name = (run) => run.folder.split("/").filter(Boolean).slice(-2).join("/");
  const names = data.runs.map(name);
  const labels = names.map((each, i) => (names.indexOf(each) === i && names.lastIndexOf(each) === i ? each : data.runs[i].folder));

  function curve(parent, title, column, sources, scale) {
    const values = [];
    data.runs.forEach((run, i) => {
      for (const source of sources) {
        run[source][column].forEach((value, k) => {
          if (value !== null) values.push({ epoch: run[source].position[k], value, run: labels[i], part: source === "val" ? "validation" : "training" });
        });
      }
    });
    if (!values.length) return;
    const encoding = {
      x: { field: "epoch", type: "quantitative", title: "epochs" },
      y: { field: "value", type: "quantitative", title: null, scale: { zero: false, ...scale } },
      color: { field: "run", type: "nominal", title: null, sort: null, legend: data.runs.length > 1 ? {} : null },
    };
    if (sources.length > 1) encoding.strokeDash = { field: "part", type: "nominal", title: null, scale: { domain: ["training", "validation"], range: [[1, 0], [5, 3]] } };
    else if (data.runs.length > 1) encoding.strokeDash = { field: "run", type: "nominal", title: null, sort: null, scale: { range: DASHES } };
    const layer = [{ mark: { type: "line", strokeWidth: 1.8, clip: true } }, { mark: { type: "point", size: values.length > 300 ? 4 : 22, filled: true, clip: true } }];
    chart(parent, title, { encoding, layer }, values, ["run", "part", "epoch", "value"]);
  }

  function showRuns() {
    const made = section("runs", data.runs.length > 1 ? "Runs" : "Run");
    const columns = ["run", "network", "recipe", "best top-1, %", "in epoch", "steps", "images/s", "minutes", "validation images", "skipped files", "device"];
    made.append(table(columns, data.runs.map((run, i) => {
      const summary = run.summary ?? {};
      return [labels[i], run.config?.arch ?? summary.arch, run.config?.recipe, summary.best_acc1 ?? null, summary.best_epoch ?? null, summary.steps ?? null,
        summary.images_per_s ?? null, isNumber(summary.duration_s) ? summary.duration_s / 60 : null, summary.val_images ?? null, run.bad_images.length, summary.device];
    }), "Runs"));
    data.runs.forEach((run, i) => {
      if (!run.summary) made.append(element("p", { class: "note" }, `${labels[i]}: has no summary.json, it is not finished or was stopped.`));
      if (run.unread) made.append(element("p", { class: "note" }, `${labels[i]}: ${run.unread} torn lines of metrics.jsonl were left out.`));
      if (run.train.epoch.length < run.train_records) made.append(element("p", { class: "note" }, `${labels[i]}: the curves show ${run.train.epoch.length} of ${run.train_records} training records, at equal distances.`));
    });
    const curves = section("curves", "Curves", "Solid: training, on augmented images and with smoothed labels; dashed: validation.");
    const grid = element("div", { class: "charts" });
    curves.append(grid);
    curve(grid, "Loss", "loss", ["train", "val"], {});
    curve(grid, "Top-1 accuracy, percent", "acc1", ["train", "val"], {});
    curve(grid, "Learning rate", "lr", ["train"], {});
    curve(grid, "Images per second", "fps", ["train"], { zero: true });
  }

  function showEvaluation(found, number) {
    const suffix = data.evaluations.length > 1 ? ` ${number + 1}` : "";
    const percent = (hits, of) => (of ? (100 * hits) / of : null);
    const made = section(`classes-${number}`, `Classes${suffix}`,
      `${found.source}: top-1 ${shown(percent(found.correct, found.images))} % (${found.correct} of ${found.images} images)` +
      (found.classes.length > 5 ? `, top-5 ${shown(percent(found.correct5, found.images))} % (${found.correct5})` : "") +
      (found.failed ? `; ${found.failed} files do not decode` : "") + (found.unlabeled ? `; ${found.unlabeled} images have no label` : "") + ".");
    const rows = found.classes.map((each, k) => [each, ...found.per_class[k]]).filter((row) => row[1] || row[3])
      .map(([each, images, correct, guessed]) => [each, percent(correct, images), correct, images, guessed]);
    rows.sort((a, b) => (a[1] ?? 101) - (b[1] ?? 101));
    made.append(table(["class", "accuracy, %", "correct", "images", "first guess of"], rows, "Accuracy of each class, lowest first"));
    if (rows.length > 1 && rows.length <= 60) {
      const values = rows.map(([each, accuracy, correct, images]) => ({ class: each, accuracy, correct, images }));
      chart(made, "Accuracy of each class, percent", {
        height: 18 * rows.length, mark: { type: "bar", tooltip: true },
        encoding: { y: { field: "class", type: "nominal", sort: null, title: null, axis: { labelLimit: 220 } }, x: { field: "accuracy", type: "quantitative", title: null, scale: { domain: [0, 100] } } },
      }, values, ["class", "accuracy", "correct", "images"]);
    }
    const confusion = section(`confusion-${number}`, `Confusion${suffix}`);
    if (found.matrix) {
      const wrong = new Map(found.pairs.map(([truth, guess, count]) => [`${truth} ${guess}`, count]));
      const values = found.classes.flatMap((truth, i) => found.classes.map((guess, j) => ({ truth, guess, images: i === j ? found.per_class[i][1] : wrong.get(`${i} ${j}`) ?? 0 })));
      chart(confusion, "Confusion matrix, images", {
        height: 26 * found.classes.length,
        encoding: { y: { field: "truth", type: "nominal", sort: null }, x: { field: "guess", type: "nominal", sort: null, axis: { labelAngle: -40 } } },
        layer: [
          { mark: { type: "rect", tooltip: true }, encoding: { color: { field: "images", type: "quantitative", scale: { scheme: "cividis" }, legend: null } } },
          { mark: { type: "text", fontSize: 11 }, encoding: { text: { field: "images" }, color: { condition: { test: `datum.images > ${Math.max(...values.map((each) => each.images)) / 2}`, value: "#000000" }, value: "#ffffff" } } },
        ],
      }, values, ["truth", "guess", "images"]);
    }
    confusion.append(element("h3", {}, `Most frequent confusions${found.pairs.length < found.all_pairs ? ` (${found.pairs.length} of ${found.all_pairs} pairs)` : ""}`));
    if (found.pairs.length) confusion.append(table(["truth", "guess", "images", "of the class, %"], found.pairs.map(([truth, guess, count]) => [found.classes[truth], found.classes[guess], count, percent(count, found.per_class[truth][0])]), "Confused pairs of classes"));
    else confusion.append(element("p", { class: "note" }, "No image was given another class."));
    if (!found.mistakes.length) return;
    const mistakes = section(`mistakes-${number}`, `Mistakes${suffix}`, "Wrong first guesses, the most confident first." + (found.mistakes.some((each) => each.heat) ? " Colored: Grad-CAM, where the image raises the score of the guess." : ""));
    mistakes.append(element("div", { class: "cards" }, found.mistakes.map((each) => element("div", { class: "card" },
      element("div", { class: "pictures" }, [["", each.picture], ["Grad-CAM of ", each.heat]].filter(([, uri]) => uri).map(([prefix, uri]) => element("img", { src: uri, alt: `${prefix}${each.path}`, loading: "lazy" }))),
      element("p", {}, element("span", { class: "wrong" }, `${percentage(each.best[0][1])} ${found.names[each.best[0][0]] ?? "background"}`)),
      element("p", {}, `truth: ${found.names[each.label]}${each.truth === null ? "" : ` (${percentage(each.truth)})`}`),
      element("p", {}, element("code", {}, each.path))))));
  }

  function showStudy(study) {
    const made = section("study", "Study", `${study.source}: each recipe with several seeds; the band is the range of the seeds, the tick their mean.`);
    const values = study.rows.map((row) => ({ recipe: row.options ? `${row.name} ${row.options}` : row.name, seed: row.seed, acc1: row.acc1, epochs: row.epochs, "image size": row.image_size, seconds: row.seconds }));
    const y = { field: "recipe", type: "nominal", sort: null, title: null, axis: { labelLimit: 240 } };
    const x = { field: "acc1", type: "quantitative", title: "top-1, percent", scale: { zero: false } };
    chart(made, "Top-1 of each seed, percent", { height: 34 * new Set(values.map((row) => row.recipe)).size, encoding: { y }, layer: [
      { mark: { type: "rule", strokeWidth: 10, opacity: 0.3 }, encoding: { x: { ...x, aggregate: "min" }, x2: { field: "acc1", aggregate: "max" } } },
      { mark: { type: "tick", thickness: 3, size: 24 }, encoding: { x: { ...x, aggregate: "mean" }, color: { value: SECOND } } },
      { mark: { type: "point", filled: true, size: 45, tooltip: true }, encoding: { x, color: { value: FIRST } } },
    ] }, values, ["recipe", "seed", "acc1", "epochs", "image size", "seconds"]);
    if (!study.curves.length) return;
    chart(made, "Validation top-1 of the seeds: mean and range", { encoding: { x: { field: "epoch", type: "quantitative", title: "epochs" }, color: { field: "recipe", type: "nominal", title: null, sort: null } }, layer: [
      { mark: { type: "area", opacity: 0.25 }, encoding: { y: { field: "low", type: "quantitative", title: null, scale: { zero: false } }, y2: { field: "high" } } },
      { mark: { type: "line" }, encoding: { y: { field: "mean", type: "quantitative" }, strokeDash: { field: "recipe", type: "nominal", title: null, sort: null, scale: { range: DASHES } } } },
    ] }, study.curves, ["recipe", "epoch", "low", "mean", "high", "seeds"]);
  }

  function showBenches(benches) {
    const made = section("benches", "Speed against peers", `${benches.source}: median ratio of comparisons in turns; the line is the range, 1 is the peer, a tick the limit where one is known.`);
    const values = benches.rows.map((row) => ({ what: row.what, against: row.against, ratio: row.ratio, low: row.range?.[0] ?? row.ratio, high: row.range?.[1] ?? row.ratio, limit: row.limit ?? null, commit: row.commit }));
    const y = { field: "what", type: "nominal", sort: null, title: null, axis: { labelLimit: 320 } };
    chart(made, "Ratio to the peer", { height: 26 * new Set(values.map((row) => row.what)).size, encoding: { y }, layer: [
      { mark: { type: "bar", tooltip: true, color: FIRST }, encoding: { x: { field: "ratio", type: "quantitative", title: null, scale: { type: "log" } }, x2: { datum: 1 } } },
      { mark: { type: "rule", strokeWidth: 2 }, encoding: { x: { field: "low", type: "quantitative" }, x2: { field: "high" } } },
      ...(values.some((row) => row.limit !== null) ? [{ transform: [{ filter: "isValid(datum.limit)" }], mark: { type: "tick", thickness: 3, color: SECOND }, encoding: { x: { field: "limit", type: "quantitative" } } }] : []),
      { mark: { type: "rule", strokeDash: [4, 3] }, encoding: { x: { datum: 1 }, y: null } },
    ] }, values, ["what", "against", "ratio", "low", "high", "limit", "commit"]);
  }

  function showComparison(found) {
    const made = section("comparison", "Comparison", `${found.source}: ${found.agreed} of ${found.images} images have the same top-1.`);
    const side = (letter) => [letter.toUpperCase(), found[letter].name, found[letter].correct[0], found[letter].correct[4], found[letter].milliseconds_per_image];
    made.append(table(["", "model", "correct at top-1", "at top-5", "ms an image"], ["a", "b"].map(side), "Both models"));
    made.append(table(["", "value"], ["largest_difference", "mean_difference", "relative_error", "cosine"].map((each) => [each.replace("_", " "), found[each]]), "Differences of the logits"));
    if (found.causes) made.append(element("p", {}, `Cause: ${found.causes.join("; ")}`));
    if (found.layers.length) made.append(table(["block", "relative error"], found.layers.map((each) => [each.name, each.error]), "Error after each block"));
    if (!found.changed.length) return;
    made.append(element("h3", {}, "Images whose class changes"));
    made.append(element("div", { class: "cards" }, found.changed.map((each) => element("div", { class: "card" },
      each.picture ? element("img", { src: each.picture, alt: each.path, loading: "lazy" }) : "",
      element("p", {}, `A: ${each.class_a} (${percentage(each.probability_a)})`), element("p", {}, `B: ${each.class_b} (${percentage(each.probability_b)})`),
      element("p", {}, each.label ? `truth: ${each.label}` : ""), element("p", {}, element("code", {}, each.path))))));
  }

  function showSweep(rows) {
    const made = section("sweep", "Batch sizes", "Images per second of the network alone, from the summaries of inference runs.");
    chart(made, "Throughput by batch size", { encoding: {
      x: { field: "batch", type: "quantitative", scale: { zero: false } }, y: { field: "images/s", type: "quantitative" },
      color: { field: "model", type: "nominal", title: null }, strokeDash: { field: "model", type: "nominal", title: null, scale: { range: DASHES } },
    }, layer: [{ mark: "line" }, { mark: { type: "point", filled: true, size: 50, tooltip: true } }] }, rows, ["model", "batch", "images/s", "file"]);
  }

  function showConfiguration() {
    const made = section("configuration", "Configuration", "Options that differ from the recipe's come first.");
    data.runs.forEach((run, i) => {
      made.append(element("h3", {}, labels[i]));
      if (run.differs.length) made.append(table(["option", "value", "recipe's"], run.differs, `Options of ${labels[i]} that differ from its recipe`));
      else made.append(element("p", { class: "note" }, run.config ? "All options are the recipe's." : "config.json is missing."));
      for (const [title, content] of [["All options", run.config], ["Environment and result", run.summary]]) {
        if (content) made.append(element("details", {}, element("summary", {}, title), table(["name", "value"], Object.entries(content), `${title} of ${labels[i]}`)));
      }
      if (run.bad_images.length) made.append(element("details", {}, element("summary", {}, `${run.bad_images.length} files that do not decode`), table(["path", "reason"], run.bad_images.map((each) => [each.path, each.reason]), "Files that do not decode")));
    });
  }

  const theme = document.getElementById("theme");
  function setTheme(isDark) {
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    theme.setAttribute("aria-pressed", String(isDark));
    charts.forEach((draw) => draw());
  }
  theme.addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
  const preference = window.matchMedia("(prefers-color-scheme: dark)");
  preference.addEventListener("change", (event) => setTheme(event.matches));
  setTheme(preference.matches);
  document.title = data.title;
  document.getElementById("title").textContent = data.title;
  if (data.runs.length) showRuns();
  data.evaluations.forEach(showEvaluation);
  if (data.comparison) showComparison(data.comparison);
  if (data.study) showStudy(data.study);
  if (data.benches) showBenches(data.benches);
  if (data.sweep.length) showSweep(data.sweep);
  if (data.runs.length) showConfiguration();
  main.append(element("p", { class: "note" }, "Made by ", element("code", {}, data.command), "."));
})();
