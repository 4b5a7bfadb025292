// Shows only the findings, figures and numbers that the reader asks for; then the page begins.
(() => {
  const seek = document.getElementById("seek"), layers = document.getElementById("seek-layers");
  const toggles = [...document.querySelectorAll(".toggle")];
  const hits = document.querySelector(".hits"), noun = document.querySelector(".filter").dataset.noun;

  // A word is found anywhere in what a thing is called; a star stands for anything but a dot.
  const matcher = (text) => {
    const pattern = text.split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&")).join("[^. ]*");
    const regex = new RegExp(pattern, "i");
    return (thing) => regex.test(thing);
  };
  // "0-3, 7" as the layers that it means; null for all.
  const asked = (text) => {
    const parts = [...text.matchAll(/(\d+)(?:\s*(?:-|\.\.|–)\s*(\d+))?/g)];
    return parts.length ? (layer) => parts.some(([, first, last]) => layer >= Number(first) && layer <= Number(last ?? first)) : null;
  };

  const apply = () => {
    const words = seek.value.trim().split(/\s+/).filter(Boolean).map(matcher);
    const inLayers = asked(layers.value);
    const loud = new Set(toggles.filter((one) => one.getAttribute("aria-pressed") === "true").map((one) => one.dataset.severity));
    const matches = (thing) => words.every((word) => word(thing));
    const count = { findings: 0, figures: 0, rows: 0 };

    for (const finding of document.querySelectorAll("#view-overview .finding")) {
      let any = false;
      for (const place of finding.querySelectorAll(".places > li")) {
        const at = place.dataset.layers.trim().split(" ").filter(Boolean).map(Number);
        const shown = loud.has(finding.dataset.severity) && matches(`${finding.dataset.sought} ${place.dataset.sought}`)
          && (!inLayers || at.some(inLayers));
        place.hidden = !shown;
        any ||= shown;
        count.findings += shown;
      }
      finding.hidden = !any;
    }
    for (const figure of document.querySelectorAll("#view-overview figure")) {
      figure.hidden = !matches(figure.dataset.sought);
      count.figures += !figure.hidden;
    }
    for (const grid of document.querySelectorAll("#view-overview .grid")) {
      grid.closest("section").hidden = ![...grid.children].some((figure) => !figure.hidden);
    }
    for (const row of document.querySelectorAll(".changes tbody tr")) row.hidden = !matches(row.dataset.sought);
    for (const table of document.querySelectorAll("details.numbers")) {
      const heads = [...table.querySelectorAll("thead th")];
      const rows = [...table.querySelectorAll("tbody tr")];
      // A word speaks of values where it is the name of one, and of sites otherwise.
      const forSites = words.filter((word) => rows.some((row) => word(row.dataset.sought)));
      const forValues = words.filter((word) => !forSites.includes(word));
      const kept = heads.map((head, i) => !i || forValues.every((word) => word(head.dataset.sought)));
      const some = kept.slice(1).some(Boolean);
      let visible = 0;
      for (const row of rows) {
        row.hidden = !some || !forSites.every((word) => word(row.dataset.sought))
          || Boolean(inLayers && !(row.dataset.layer !== undefined && inLayers(Number(row.dataset.layer))));
        visible += !row.hidden;
        [...row.children].forEach((cell, i) => { cell.hidden = !kept[i]; });
      }
      heads.forEach((head, i) => { head.hidden = !kept[i]; });
      table.hidden = !visible;
      // What was asked for is opened, and closed again with the question.
      if (words.length || inLayers) { table.dataset.asked ??= String(table.open); table.open = true; }
      else if (table.dataset.asked) { table.open = table.dataset.asked === "true"; delete table.dataset.asked; }
      count.rows += visible;
    }
    const filtered = words.length || inLayers || loud.size < toggles.length;
    hits.textContent = filtered ? `Shown: ${noun} ${count.findings}, figures ${count.figures}, rows of numbers ${count.rows}` : "";
    actome.draw(document.getElementById("view-overview"));
  };

  seek.addEventListener("input", apply);
  layers.addEventListener("input", apply);
  document.querySelector(".filter").addEventListener("submit", (event) => event.preventDefault());
  for (const toggle of toggles) {
    toggle.addEventListener("click", () => {
      toggle.setAttribute("aria-pressed", String(toggle.getAttribute("aria-pressed") !== "true"));
      apply();
    });
  }
  actome.start();
})();
