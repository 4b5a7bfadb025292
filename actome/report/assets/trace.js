// Figures of a trace, made of the page's numbers and a few templates, and the slider that moves through the steps.
(() => {
  const { data, specs, make, word } = actome;
  const byId = (id) => document.getElementById(id);
  const slider = byId("step"), view = byId("view"), axis = byId("axis"), seek = byId("seek"), play = byId("play");
  const numeric = (x) => x !== null && x !== undefined;
  const least = Math.min(...data.steps.filter((step) => step > 0), Infinity);
  let now = data.steps.at(-1);

  // The last step of a figure that is not after the slider's.
  const stepOf = (entry) => entry.steps.filter((step) => step <= now).at(-1) ?? entry.steps[0];
  const title = (entry) => `${word(entry.measure).title}${entry.kind ? `, ${entry.kind}` : ""}`;

  // Rows of one figure: a number for each layer, step and, where there is one, head.
  const rowsOf = (entry) => {
    const ends = new Map([[entry.steps[0], "first"], [entry.steps.at(-1), "last"]]);
    if (!entry.layers) return entry.steps.map((step, i) => ({ step, value: entry.values[i] })).filter((row) => numeric(row.value));
    const rows = [];
    entry.layers.forEach((layer, i) => entry.steps.forEach((step, j) => {
      const values = entry.place ? entry.values[i][j] : [entry.values[i][j]];
      values.forEach((value, place) => {
        if (!numeric(value)) return;
        const name = `layer ${layer}${entry.place ? ` ${entry.place} ${place}` : ""}`;
        rows.push({ layer, step, value, name, place, end: ends.get(step) ?? null });
      });
    }));
    return rows;
  };

  // Scales and ticks of steps, wherever a template has an axis of them.
  const stepped = (spec) => {
    for (const layer of [spec, ...(spec.layer || [])]) {
      const x = layer.encoding?.x;
      if (x?.field !== "step" || x.type !== "quantitative") continue;
      x.scale = axis && axis.value === "symlog" && Number.isFinite(least)
        ? { type: "symlog", constant: least, nice: false, domain: [data.steps[0], data.steps.at(-1)] } : { nice: false };
      if (x.axis && axis && axis.value === "symlog") x.axis.values = data.ticks;
    }
    return spec;
  };
  // Colours that stay the same for all steps; through zero where a value has a sign.
  const coloured = (spec, entry, rows) => {
    const values = rows.map((row) => row.value), low = Math.min(...values), high = Math.max(...values);
    const widest = Math.max(Math.abs(low), Math.abs(high));
    for (const layer of [spec, ...(spec.layer || [])]) {
      const colour = layer.encoding?.color;
      if (colour?.field === "value") colour.scale = { ...colour.scale, domain: word(entry.measure).signed && low < 0 ? [-widest, widest] : [low, high] };
    }
    return spec;
  };
  // Where phases begin, on the axis of steps of a figure.
  const phases = (layer) => ({
    data: { values: data.phases },
    mark: { type: "rule", color: "#888", opacity: 0.45 },
    encoding: { x: layer.encoding.x, tooltip: [{ field: "name", title: "phase" }, { field: "step", title: "from step" }] },
  });
  const named = (spec, place) => JSON.parse(JSON.stringify(spec).replaceAll('"title":"head"', `"title":"${place}"`));

  const figure = (entry, template, key) => {
    const { says } = word(entry.measure);
    const plot = make("div", { class: "plot", "data-figure": key, role: "img", "aria-label": `${title(entry)}: ${says}` });
    const rows = rowsOf(entry);
    const fill = () => {
      const spec = coloured(stepped(structuredClone(named(specs[template], entry.place || "head"))), entry, rows);
      if (template === "curves" || template === "lines") spec.layer.push(...data.phases.length ? [phases(spec.layer[0])] : []);
      spec.datasets = { ...spec.datasets, rows };
      for (const one of spec.params || []) if (one.name === "at") one.value = stepOf(entry);
      plot.spec = spec;
    };
    fill();
    plot.fill = fill;
    plot.entry = entry;
    return make("figure", { "data-sought": `${entry.measure} ${title(entry)}` },
      make("figcaption", {}, make("strong", {}, title(entry)), says), plot);
  };

  const ordered = (entries) => entries.map((entry, i) => [entry, i])
    .sort(([a, i], [b, j]) => word(a.measure).order - word(b.measure).order || i - j).map(([entry]) => entry);

  const drawCurves = () => {
    const grid = byId("grid-curves");
    if (!grid) return;
    const mapped = view.value === "map";
    grid.replaceChildren(
      ...ordered(data.lines).map((entry) => figure(entry, "lines", `line-${entry.key}`)),
      ...ordered(data.stacks.filter((entry) => !mapped || (entry.layers.length > 1 && !entry.place)))
        .map((entry) => figure(entry, mapped ? "map" : entry.layers.length > 1 || entry.place ? "curves" : "lines", `${view.value}-${entry.key}`)),
    );
  };
  const fillGrid = (id, template, entries) => byId(id)?.replaceChildren(
    ...ordered(entries).map((entry) => figure(entry, template, `${template}-${entry.key}`)));

  const apply = () => {
    const words = (seek?.value || "").trim().toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const one of document.querySelectorAll("figure, .dates tbody tr")) {
      one.hidden = !words.every((part) => one.dataset.sought.toLowerCase().includes(part));
      shown += !one.hidden && one.tagName === "FIGURE";
    }
    const hits = document.querySelector(".hits");
    if (hits) hits.textContent = words.length ? `Shown: figures ${shown}` : "";
  };

  let moving = Promise.resolve();
  const move = () => {
    now = data.steps[Number(slider ? slider.value : data.steps.length - 1)];
    const shown = now === undefined ? "" : now.toLocaleString("en-US");
    if (slider) { byId("step-name").textContent = shown; slider.setAttribute("aria-valuetext", `step ${shown}`); }
    for (const place of document.querySelectorAll(".now")) place.textContent = shown;
    // What is drawn follows; what is not yet takes the step when it is.
    moving = moving.then(() => Promise.all([...document.querySelectorAll("[data-figure]")].map((plot) => {
      const at = stepOf(plot.entry);
      for (const one of plot.spec.params || []) if (one.name === "at") one.value = at;
      return plot.view && plot.isConnected ? plot.view.signal("at", at).runAsync() : null;
    }))).then(() => { document.documentElement.dataset.step = now; });
  };

  const redraw = () => actome.draw(byId("view-overview"), true);
  fillGrid("grid-profiles", "profile", data.stacks.filter((entry) => !entry.place && entry.layers.length > 1));
  fillGrid("grid-heads", "heads", data.stacks.filter((entry) => entry.place));
  drawCurves();
  move();

  slider?.addEventListener("input", move);
  view?.addEventListener("change", () => { drawCurves(); apply(); actome.draw(byId("view-overview")); });
  axis?.addEventListener("change", () => { for (const plot of document.querySelectorAll("[data-figure]")) plot.fill(); redraw(); });
  seek?.addEventListener("input", () => { apply(); actome.draw(byId("view-overview")); });
  document.querySelector(".filter")?.addEventListener("submit", (event) => event.preventDefault());

  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.setAttribute("aria-pressed", "false"); play.setAttribute("aria-label", "Play"); play.textContent = "▶"; };
  play?.addEventListener("click", () => {
    if (timer) { stop(); return; }
    if (Number(slider.value) === data.steps.length - 1) { slider.value = 0; move(); }
    play.setAttribute("aria-pressed", "true");
    play.setAttribute("aria-label", "Pause");
    play.textContent = "❚❚";
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      move();
      if (Number(slider.value) === data.steps.length - 1) stop();
    }, Math.max(120, Math.min(700, 8000 / data.steps.length)));
  });
  actome.start();
})();
