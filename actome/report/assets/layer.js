// The page of one layer: everything that was measured there, beside the other layers.
actome.showLayer = (at, page) => {
  const { data, specs, make, show, word } = actome;
  const here = (entry) => entry.stack === at.stack;
  const peers = data.layers.filter(here);
  const section = (title, lead, ...children) =>
    make("section", {}, make("h2", {}, title), ...(lead ? [make("p", { class: "lead" }, lead)] : []), ...children);
  const table = (head, rows, cls = "") =>
    make("div", { class: "scroll" }, make("table", { class: cls },
      make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, ...rows)));

  const step = (by, label) => {
    const target = peers[peers.indexOf(at) + by];
    return target ? make("a", { href: `#${target.page}`, rel: by < 0 ? "prev" : "next" }, label(target.layer)) : make("span");
  };

  const findings = () => {
    const list = make("ol", { class: "findings" });
    for (const one of document.querySelectorAll("#view-overview .finding")) {
      const copy = one.cloneNode(true);
      copy.hidden = false;
      for (const place of copy.querySelectorAll(".places > li")) {
        place.hidden = false;
        if (!place.dataset.pages.split(" ").includes(at.page)) place.remove();
      }
      if (copy.querySelector(".places > li")) list.append(copy);
    }
    return list.children.length ? list : make("p", { class: "calm" }, "Nothing stands out here.");
  };

  const numeric = (x) => typeof x === "number";
  // A line through all layers with a dot at this one.
  const strip = (values, i) => {
    const known = values.filter(numeric);
    const low = Math.min(...known), span = Math.max(...known) - low || 1;
    const x = (j) => (values.length > 1 ? 3 + (94 * j) / (values.length - 1) : 50);
    const y = (value) => 19 - (16 * (value - low)) / span;
    const ns = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(ns, "svg");
    svg.setAttribute("viewBox", "0 0 100 22");
    svg.setAttribute("class", "strip");
    svg.setAttribute("aria-hidden", "true");
    const line = document.createElementNS(ns, "polyline");
    line.setAttribute("points", values.map((value, j) => (numeric(value) ? `${x(j).toFixed(1)},${y(value).toFixed(1)}` : "")).join(" "));
    svg.append(line);
    if (numeric(values[i])) {
      const dot = document.createElementNS(ns, "circle");
      dot.setAttribute("cx", x(i)); dot.setAttribute("cy", y(values[i])); dot.setAttribute("r", 3);
      svg.append(dot);
    }
    return svg;
  };
  const median = (values) => {
    const sorted = values.filter(numeric).sort((a, b) => a - b);
    const middle = sorted.length >> 1;
    if (!sorted.length) return null;
    return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
  };

  const numbers = () => {
    const kinds = new Map();
    for (const entry of data.values.filter(here)) {
      if (entry.layers.includes(at.layer)) kinds.set(entry.kind, [...(kinds.get(entry.kind) || []), entry]);
    }
    const compared = data.values.some((entry) => entry.others);
    return [...kinds].map(([kind, entries]) => {
      const rows = entries.sort((a, b) => word(a.measure).order - word(b.measure).order).map((entry) => {
        const i = entry.layers.indexOf(at.layer), { title, says, look } = word(entry.measure);
        const rest = entry.values.filter((_, j) => j !== i);
        const known = entry.values.filter(numeric), value = entry.values[i];
        const rank = numeric(value) && known.length > 1 && Math.max(...known) > Math.min(...known)
          ? `${1 + known.filter((one) => one > value).length} of ${known.length}` : "–";
        return make("tr", {},
          make("th", { scope: "row", title: says }, title),
          make("td", { class: "value" }, show(value, look)),
          ...(compared ? [make("td", {}, show(entry.others && entry.others[i], look))] : []),
          make("td", {}, show(look === "index" ? null : median(rest), look)),
          make("td", {}, look === "index" ? "–" : rank),
          make("td", {}, look === "index" ? "" : strip(entry.values, i)));
      });
      const head = ["value", "here", ...(compared ? ["other scan"] : []), "median elsewhere", "from the top", "through the layers"];
      return make("div", { class: "card" }, make("h3", {}, kind), table(head, rows, "layer"));
    });
  };

  const figure = (title, caption, spec) => {
    const plot = make("div", { class: "plot", "data-figure": `layer:${title}`, role: "img", "aria-label": `${title}: ${caption}` });
    plot.spec = spec;
    return make("figure", {}, make("figcaption", {}, make("strong", {}, title), ` ${caption}`), plot);
  };
  const filled = (name, datasets) => ({ ...structuredClone(specs[`layer:${name}`]), datasets });
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

  const distributions = () => {
    const mine = data.arrays.filter((one) => here(one) && one.layer === at.layer && one.head === undefined && one.expert === undefined);
    return mine.flatMap((one) => {
      const others = data.arrays.filter((two) => here(two) && two.kind === one.kind && two.measure === one.measure
        && two.layer !== at.layer && two.head === undefined && two.expert === undefined);
      const { title, says, look } = word(one.measure);
      if (one.bins) {
        if (!one.bins.length) return [];
        const lows = [...new Set([one, ...others].flatMap((two) => two.bins.map((bin) => bin.low)))].sort((a, b) => a - b);
        const rest = others.length ? lows.map((low) => ({ low, share: mean(others.map((two) => (two.bins.find((bin) => bin.low === low) || { share: 0 }).share)) })) : [];
        if (rest.length) rest.push({ low: lows.at(-1) * 2, share: 0 });
        return [figure(`${title}, ${one.kind}`, `${says}${rest.length ? " The line is the mean of the other layers." : ""}`, filled("histogram", { here: one.bins, rest }))];
      }
      const along = (two) => two.values.map((value, i) => ({ layer: two.layer, at: two.at ? two.at[i] : i, value }));
      const ranks = one.dim === "rank";
      const points = (two) => along(two).map((row) => ({ ...row, at: row.at + (ranks ? 1 : 0) })).filter((row) => row.value !== null && (!ranks || row.value > 0));
      if (points(one).length < 2 || points(one).every((row) => row.value === 0)) return [];
      const near = others.filter((_, i) => i % Math.ceil(others.length / 24 || 1) === 0);
      return [figure(`${title}, ${one.kind}`, `${says} By ${one.dim}${near.length ? "; pale lines are other layers" : ""}.`,
        filled(ranks ? "decay" : "list", { here: points(one), rest: near.flatMap(points) }))];
    });
  };

  const heads = () => ["head", "expert"].flatMap((place) => {
    const entries = data.heads.filter((entry) => here(entry) && entry.place === place && entry.layers.includes(at.layer));
    if (!entries.length) return [];
    const columns = entries.map((entry) => ({ ...entry, now: entry.values[entry.layers.indexOf(at.layer)] }));
    const count = Math.max(...columns.map((column) => column.now.length));
    const rows = Array.from({ length: count }, (_, i) => make("tr", {},
      make("th", { scope: "row" }, String(i)),
      ...columns.map((column) => {
        const value = column.now[i], top = Math.max(1e-9, ...column.values.flat().filter(numeric).map(Math.abs));
        const cell = make("td", {}, show(value, word(column.measure).look));
        if (numeric(value)) cell.style.setProperty("--fill", `${Math.round((60 * Math.abs(value)) / top)}%`);
        return cell;
      })));
    const head = [place, ...columns.map((column) => `${word(column.measure).title}${column.kind === "attn.pattern" ? "" : `, ${column.kind}`}`)];
    return [section(place === "head" ? "Heads" : "Experts", "Colour follows the size within all layers.", make("div", { class: "card" }, table(head, rows, "filled")))];
  });

  const units = () => {
    const rows = data.units.filter((one) => here(one) && one.layer === at.layer);
    if (!rows.length) return [];
    const measures = [...new Set(rows.map((one) => one.measure))];
    const places = new Map();
    for (const one of rows) {
      const key = `${one.kind} ${one.unit}`;
      places.set(key, { ...(places.get(key) || {}), kind: one.kind, unit: one.unit, [one.measure]: one.value });
    }
    const shown = [...places.values()].slice(0, 100);
    return [section("Units that findings name", places.size > shown.length ? `The first ${shown.length} of ${places.size}.` : "",
      make("div", { class: "card" }, table(["site", "unit", ...measures.map((name) => word(name).title)],
        shown.map((one) => make("tr", {}, make("th", { scope: "row" }, one.kind), make("td", {}, String(one.unit)),
          ...measures.map((name) => make("td", {}, one[name] === undefined ? "" : show(one[name], word(name).look))))))))];
  };

  const drawn = distributions();
  const link = document.getElementById("text") ? [make("p", { class: "small" }, make("a", { href: "#text", "data-token-layer": at.layer }, "See this layer in the text"))] : [];
  page.replaceChildren(
    make("div", { class: "title" }, step(-1, (n) => `← layer ${n}`),
      make("h2", { id: "layer" }, `${at.stack ? `${at.stack}, ` : ""}Layer ${at.layer}`), step(1, (n) => `layer ${n} →`)),
    make("section", {}, findings(), ...link),
    section("Numbers", "Each value here, beside the same in the other layers. The dot is this layer.", make("div", { class: "grid wide" }, ...numbers())),
    ...(drawn.length ? [section("Distributions", "", make("div", { class: "grid" }, ...drawn))] : []),
    ...heads(), ...units(),
  );
};
