"use strict";
(() => {
  const root = document.documentElement;
  const config = {
    responsive: true, displaylogo: false, showTips: false, scrollZoom: false,
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };

  // a figure names the page's colours; which they are depends on the reader's scheme
  function coloured(value, style) {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((part) => coloured(part, style));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, coloured(part, style)]));
    return value;
  }

  function draw(plot, width) {
    const source = document.getElementById("figure-" + plot.dataset.figure);
    const figure = coloured(JSON.parse(source.textContent), getComputedStyle(root));
    figure.layout.modebar = { bgcolor: "rgba(0,0,0,0)" };
    figure.layout.font.family = getComputedStyle(document.body).fontFamily;
    if (width) figure.layout.width = width;
    if (plot.clientWidth < 480 && !width) {
      figure.layout.font.size = 11;
      figure.layout.dragmode = false;  // a thumb scrolls the page
    }
    Plotly.react(plot, figure.data, figure.layout, config);
  }

  // Plotly is packed in the page; unpacked it is the script that the page's policy names by its hash
  async function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const text = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    document.head.append(Object.assign(document.createElement("script"), { textContent: text }));
    if (!window.Plotly) throw new Error("they are not what was packed");
  }

  const plots = [...document.querySelectorAll("[data-figure]")];
  const all = (width) => { if (window.Plotly) plots.forEach((plot) => draw(plot, width)); };
  for (const plot of plots) {
    // room for it, so that nothing moves when it is drawn
    const source = document.getElementById("figure-" + plot.dataset.figure);
    plot.style.minHeight = JSON.parse(source.textContent).layout.height + "px";
  }
  const packed = document.getElementById("plotly");
  if (packed) unpack(packed.textContent).then(() => { all(); root.classList.add("drawn"); }, (error) => {
    for (const plot of plots) plot.textContent = "This browser cannot unpack the plots: " + error.message;
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => all());
  window.addEventListener("beforeprint", () => { root.classList.add("printing"); all(660); });
  window.addEventListener("afterprint", () => { root.classList.remove("printing"); all(); });

  const pair = document.getElementById("pair");
  if (pair) pair.addEventListener("change", () => {
    const plot = document.getElementById("front");
    plot.dataset.figure = pair.value;
    draw(plot);
  });

  // while the run goes on, a new page is written every few seconds
  const live = document.getElementById("live");
  if (live) setInterval(() => { if (live.checked && !document.hidden) location.reload(); }, 15000);
})();
