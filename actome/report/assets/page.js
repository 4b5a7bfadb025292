// Draws every figure with the colours of the style sheet, and again when the reader changes from light to dark.
(() => {
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const look = () => {
    const style = getComputedStyle(document.documentElement);
    const [ink, soft, line, low, mid, high, font, ...hues] =
      ["ink", "soft", "line", "low", "mid", "high", "sans", "one", "two", "three", "four", "five"]
        .map((name) => style.getPropertyValue(`--${name}`).trim());
    const words = { labelColor: soft, titleColor: soft, labelFont: font, titleFont: font, labelFontSize: 11, titleFontSize: 11, titleFontWeight: 400 };
    return {
      background: null,
      font,
      view: { stroke: null },
      axis: { ...words, domainColor: line, tickColor: line, gridColor: line, tickSize: 4, labelPadding: 4 },
      legend: words,
      range: { category: hues, heatmap: [low, mid, high], ramp: [low, mid, high] },
      rect: { stroke: line, strokeWidth: 0.5 },
    };
  };
  const draw = async () => {
    const config = look();
    for (const place of document.querySelectorAll("[data-figure]")) {
      await vegaEmbed(place, specs[place.dataset.figure], {
        config, mode: "vega-lite", renderer: "svg", actions: false, tooltip: { theme: "custom", disableDefaultStyle: false },
      });
    }
    document.documentElement.dataset.drawn = document.querySelectorAll("[data-figure] svg").length;
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
