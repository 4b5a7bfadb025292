// The text with a value behind each token: a menu of values, a slider of layers, a tip with the exact numbers.
(() => {
  const { data, make, show, word } = actome;
  if (!data.passage) return;
  const { values, tokens } = data.passage;
  const menu = document.getElementById("token-value");
  const slider = document.getElementById("token-layer");
  const box = document.querySelector(".passage");
  const spans = [...box.querySelectorAll("[data-token]")];
  const tip = document.getElementById("tip");
  const now = document.getElementById("token-now");
  let wanted = null; // the layer that the reader chose, kept when another value is chosen

  const groups = new Map();
  values.forEach((entry, i) => {
    const place = entry.layers ? entry.kind : "prediction";
    if (!groups.has(place)) groups.set(place, make("optgroup", { label: place }));
    groups.get(place).append(make("option", { value: i }, word(entry.measure).title));
  });
  menu.append(...groups.values());

  const current = () => {
    const entry = values[menu.value];
    return { entry, row: entry.layers ? entry.values[slider.value] : entry.values };
  };
  const quantile = (sorted, q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];

  const paint = () => {
    const { entry, row } = current();
    const { says, look } = word(entry.measure);
    const known = row.filter((x) => typeof x === "number").sort((a, b) => a - b);
    // Colours end at the 2nd and 98th percentile, so that one extreme token leaves the others their differences.
    const low = quantile(known, 0.02), high = quantile(known, 0.98);
    const wide = look === "ratio" && low > 0 && high / low > 12;
    const at = wide ? Math.log : (x) => x;
    spans.forEach((span, i) => {
      const x = row[i];
      const strength = typeof x !== "number" || high <= low ? 0 : Math.min(1, Math.max(0, (at(x) - at(low)) / (at(high) - at(low))));
      span.style.setProperty("--heat", `${Math.round(100 * strength)}%`);
      span.classList.toggle("none", typeof x !== "number");
    });
    document.getElementById("scale-low").textContent = show(low, look);
    document.getElementById("scale-high").textContent = show(high, look);
    document.getElementById("token-says").textContent = says;
    document.getElementById("token-layer-name").textContent = entry.layers ? entry.layers[slider.value] : "–";
    box.dataset.painted = `${entry.measure} ${entry.layers ? entry.layers[slider.value] : ""}`.trim();
  };

  const choose = () => {
    const { entry } = current();
    slider.disabled = !entry.layers;
    slider.max = entry.layers ? entry.layers.length - 1 : 0;
    if (entry.layers) {
      const nearest = entry.layers.reduce((best, layer, i) => (Math.abs(layer - wanted) < Math.abs(entry.layers[best] - wanted) ? i : best), 0);
      slider.value = wanted === null ? entry.layers.length - 1 : nearest;
    }
    paint();
  };
  menu.addEventListener("change", choose);
  slider.addEventListener("input", () => { wanted = current().entry.layers[slider.value]; paint(); });
  document.addEventListener("click", (event) => {
    const layer = event.target.closest("[data-token-layer]")?.dataset.tokenLayer;
    if (layer === undefined) return;
    wanted = Number(layer);
    if (!current().entry.layers) menu.value = values.findIndex((entry) => entry.layers);
    choose();
  });

  const tell = (span) => {
    spans.forEach((one) => one.classList.toggle("active", one === span));
    if (!span) { tip.hidden = true; return; }
    const i = Number(span.dataset.token);
    const { entry, row } = current();
    const { title, look } = word(entry.measure);
    const lines = [[title, show(row[i], look)]];
    for (const other of values) {
      if (!other.layers && other !== entry) lines.push([word(other.measure).title, show(other.values[i], word(other.measure).look)]);
    }
    if (span.dataset.sink) lines.push(["attention rests here", span.dataset.sink]);
    if (span.dataset.massive) lines.push(["massive", span.dataset.massive]);
    tip.replaceChildren(
      make("p", {}, make("code", {}, JSON.stringify(tokens[i])), ` position ${i}`),
      make("dl", {}, ...lines.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))));
    now.textContent = `${JSON.stringify(tokens[i])}, position ${i}: ${lines.map((line) => line.join(" ")).join("; ")}`;
    tip.hidden = false;
    const [first] = span.getClientRects();
    if (!first) return;
    tip.style.left = `${Math.max(8, Math.min(first.left, innerWidth - tip.offsetWidth - 8)) + scrollX}px`;
    const below = first.bottom + 6;
    tip.style.top = `${(below + tip.offsetHeight > innerHeight ? first.top - tip.offsetHeight - 6 : below) + scrollY}px`;
  };
  const over = (event) => event.target.closest("[data-token]");
  box.addEventListener("pointerover", (event) => over(event) && tell(over(event)));
  box.addEventListener("pointerleave", () => tell(null));
  box.addEventListener("blur", () => tell(null));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -tokens.length, End: tokens.length, Escape: 0 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    if (!step) { tell(null); return; }
    const at = spans.findIndex((span) => span.classList.contains("active"));
    tell(spans[Math.max(0, Math.min(spans.length - 1, at + step))]);
  });
  addEventListener("hashchange", () => tell(null));
  choose();
})();
