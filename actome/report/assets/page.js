// Draws figures with the colours of the style sheet, again when the reader changes from light to dark, and moves
// between the overview and the pages of layers by the address behind the #.
const actome = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const overview = document.getElementById("view-overview");
  const page = document.getElementById("view-layer");

  // An element with attributes and children; text is only ever put in as text.
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  };

  // Numbers as words.py shows them.
  const three = (x) => {
    const size = Math.abs(x);
    if (size >= 1e3 && size < 1e7) return Number(x.toPrecision(3)).toLocaleString("en-US", { maximumFractionDigits: 0 });
    if (size !== 0 && (size < 1e-4 || size >= 1e7)) {
      const [digits, power] = x.toExponential(2).split("e");
      return `${Number(digits)}e${power[0]}${power.slice(1).padStart(2, "0")}`;
    }
    return String(Number(x.toPrecision(3)));
  };
  const show = (x, look) => {
    if (x === null || x === undefined) return "–";
    if (typeof x === "string") return x;
    if (look === "share" && Math.abs(x) >= 1e-6 && Math.abs(x) < 1e-3) return `${Number((100 * x).toPrecision(2)).toFixed(6).replace(/0+$/, "")} %`;
    if (look === "share") return `${(100 * x).toFixed(x !== 0 && Math.abs(x) < 0.1 ? 1 : 0)} %`.replace("-0.0 ", "0.0 ");
    if (look === "index" || (Number.isInteger(x) && Math.abs(x) < 1e4)) return x.toFixed(0);
    return three(x);
  };
  const word = (measure) => data.words[measure] || { title: measure, says: "", look: "number", order: 99 };

  const look = () => {
    const style = getComputedStyle(document.documentElement);
    const [ink, soft, line, low, mid, high, font, card, critical, warning, info, ...hues] =
      ["ink", "soft", "line", "low", "mid", "high", "sans", "card", "critical", "warning", "info", "one", "two", "three", "four", "five"]
        .map((name) => style.getPropertyValue(`--${name}`).trim());
    const words = { labelColor: soft, titleColor: soft, labelFont: font, titleFont: font, labelFontSize: 11, titleFontSize: 11, titleFontWeight: 400 };
    return {
      background: null,
      font,
      view: { stroke: null },
      axis: { ...words, domainColor: line, tickColor: line, gridColor: line, tickSize: 4, labelPadding: 4 },
      legend: { ...words, symbolStrokeColor: soft, columnPadding: 12 },
      range: { category: hues, heatmap: [low, mid, high], ramp: [low, mid, high] },
      rect: { stroke: line, strokeWidth: 0.5 },
      mark: { color: hues[0] },
      style: { here: { color: hues[0] }, rest: { color: soft }, critical: { color: critical }, warning: { color: warning }, info: { color: info } },
    };
  };

  let drawing = Promise.resolve();
  // Draws the figures of a part of the page that are not there yet, or all of them anew.
  const draw = (part, anew = false) => {
    drawing = drawing.then(async () => {
      const config = look();
      for (const place of part.querySelectorAll(anew ? "[data-figure]" : "[data-figure]:not(.drawn)")) {
        // What is not shown has no width to be drawn in; it is drawn when it is shown.
        if (!place.offsetParent) { place.classList.remove("drawn"); continue; }
        const spec = place.spec || specs[place.dataset.figure];
        const { view } = await vegaEmbed(place, spec, {
          config, mode: "vega-lite", renderer: "svg", actions: false, tooltip: { theme: "custom", disableDefaultStyle: false },
        });
        view.addEventListener("click", (event, item) => item && open(item.datum));
        place.view = view; // for scripts that move something in it
        place.classList.add("drawn");
      }
      document.documentElement.dataset.drawn = document.querySelectorAll("[data-figure].drawn svg").length;
    });
    return drawing;
  };

  const open = (datum) => {
    if (!datum || !Number.isInteger(datum.layer) || datum.layer < 0) return;
    const stack = (datum.site || "").split("blocks.")[0].replace(/\.$/, "");
    const target = data.layers.find((one) => one.layer === datum.layer && (one.stack === stack || !datum.site));
    if (target) location.hash = target.page;
  };

  const route = () => {
    const name = decodeURIComponent(location.hash.slice(1));
    const layer = data.layers.find((one) => one.page === name);
    overview.hidden = Boolean(layer);
    page.hidden = !layer;
    for (const link of document.querySelectorAll("nav a")) {
      link.toggleAttribute("aria-current", link.hash === location.hash && Boolean(layer));
    }
    if (layer) {
      document.querySelector("nav a[aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
      actome.showLayer(layer, page);
      scrollTo(0, 0);
      draw(page);
    } else {
      page.replaceChildren();
      if (name) document.getElementById(name)?.scrollIntoView();
      draw(overview);
    }
  };

  const start = () => {
    route();
    addEventListener("hashchange", route);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(document.body, true));
  };
  return { data, specs, make, show, word, draw, start };
})();
